"""Count executions, commits and recoveries from the logs of the workers."""

from __future__ import annotations

import re
import time
from collections import Counter
from pathlib import Path
from typing import Final

#: A batch: its job and its index.
Key = tuple[str, int]

#: Seconds after which the recovery of a batch counts as slow.
SLOW_S: Final = 8.0

_RECEIVED: Final = re.compile(r"Task embedq\.embed_batch\[(\w+):(\d+)[:\]].* received")
_DONE: Final = re.compile(r"batch_done job=(\w+) index=(\d+) .*committed=(\w+)")
_OTHER: Final = re.compile(
    r"(batch_skipped|batch_failed|isolation_started|text_dead_lettered) job=(\w+) index=(\d+)"
)


class Watch:
    """Reader of the logs, one file per worker over all its restarts."""

    def __init__(self, logs: dict[str, Path]) -> None:
        self._logs = logs
        self._read = dict.fromkeys(logs, 0)
        self._rest = dict.fromkeys(logs, b"")
        self._in_flight: dict[str, Key | None] = dict.fromkeys(logs)
        self._interrupted: dict[Key, tuple[float, str]] = {}
        self._redis_killed_at: float | None = None
        self._committed_at = time.monotonic()
        #: Batch -> number of executions that a worker started, and that finished.
        self.started: Counter[Key] = Counter()
        self.finished: Counter[Key] = Counter()
        self.commits: Counter[Key] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        #: What was killed, its batch and seconds until that was committed; seconds from the kill of
        #: a Redis until the next commit.
        self.recoveries: list[tuple[str, Key, float]] = []
        self.redis_recoveries: list[float] = []
        self.slow: list[str] = []
        self.longest_silence_s = 0.0

    def poll(self) -> None:
        """Read the log lines since the last call."""
        for worker, path in self._logs.items():
            self._poll(worker, path)

    def note_kill(self, worker: str, what: str) -> None:
        """Record that a process of a worker is about to be killed."""
        self._poll(worker, self._logs[worker])
        key = self._in_flight[worker]
        if key is not None:
            self._interrupted.setdefault(key, (time.monotonic(), what))
        self._in_flight[worker] = None

    def note_redis_kill(self) -> None:
        """Record that a Redis was killed."""
        self._redis_killed_at = time.monotonic()

    def forget(self, jobs: set[str]) -> None:
        """Drop the interrupted batches of jobs that were replaced."""
        self._interrupted = {key: of for key, of in self._interrupted.items() if key[0] not in jobs}

    def _poll(self, worker: str, path: Path) -> None:
        with path.open("rb") as log:
            log.seek(self._read[worker])
            new = log.read()
        self._read[worker] += len(new)
        *lines, self._rest[worker] = (self._rest[worker] + new).split(b"\n")
        for line in lines:
            self._note(worker, line.decode(errors="replace"))

    def _note(self, worker: str, line: str) -> None:
        if found := _RECEIVED.search(line):
            key = (found[1], int(found[2]))
            self._in_flight[worker] = key
            self.started[key] += 1
        elif found := _DONE.search(line):
            self._done(worker, (found[1], int(found[2])), found[3])
        elif found := _OTHER.search(line):
            self.events[found[1]] += 1
            if found[1] == "batch_skipped":
                key = (found[2], int(found[3]))
                self.started[key] -= 1
                self._interrupted.pop(key, None)
                self._in_flight[worker] = None
        elif "lease_renewal_failed" in line or "redis_retry reason" in line or "Traceback" in line:
            self.events[line.split()[-1] if "Traceback" not in line else "traceback"] += 1

    def _done(self, worker: str, key: Key, verdict: str) -> None:
        now = time.monotonic()
        self._in_flight[worker] = None
        self.finished[key] += 1
        self.verdicts[verdict] += 1
        interrupted = self._interrupted.pop(key, None)
        if interrupted is not None and verdict != "job_gone":
            self._note_recovery(key, interrupted[1], now - interrupted[0])
        if verdict != "yes":
            return
        self.commits[key] += 1
        self.longest_silence_s = max(self.longest_silence_s, now - self._committed_at)
        self._committed_at = now
        if self._redis_killed_at is not None:
            self.redis_recoveries.append(now - self._redis_killed_at)
            self._redis_killed_at = None

    def _note_recovery(self, key: Key, what: str, seconds: float) -> None:
        self.recoveries.append((what, key, seconds))
        if seconds > SLOW_S:
            self.slow.append(
                f"{key[0]}:{key[1]} recovered {seconds:.1f} s after a {what} was killed"
            )

    @property
    def silence_s(self) -> float:
        """Seconds since the last commit."""
        return time.monotonic() - self._committed_at
