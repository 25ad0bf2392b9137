"""Generate the inputs of a chaos run, and run `embedq embed` on them until it has finished."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ops.chaos.fleet import SHORTENED, environment

from embedq.bulk.checkpoint import manifest_path
from embedq.cli.console import EXIT_FAILED, EXIT_OK
from embedq.jobs.batches import split

#: Texts per batch.
BATCH_TEXTS: Final = 16
#: Faults that a text can trigger in the stub engine.
POISONS: Final = ("raise", "exit", "segfault", "hang")
#: Batches per poisoned text, on average.
POISON_EVERY: Final = 250
#: Seconds before a producer that exited is restarted.
RESTART_DELAY_S: Final = 0.5


@dataclass(slots=True)
class Task:
    """One input file and its job.

    Attributes:
        input, output: the files.
        texts: all texts, in order.
        poisoned: rows that cannot be embedded.
        jobs: ids of the job, one per resume.
        job: the latest id.
    """

    input: Path
    output: Path
    texts: list[str]
    poisoned: frozenset[int]
    jobs: set[str] = field(default_factory=set)
    job: str = ""

    def batches(self) -> tuple[int, set[int]]:
        """Return the number of batches, and the indices of those that contain a poisoned text."""
        limits = {"max_texts": BATCH_TEXTS, "max_tokens": 30_000, "max_length": 256}
        text_batches = list(split(self.texts, **limits))
        ends = [text_batch.start + len(text_batch) for text_batch in text_batches]
        return len(text_batches), {bisect_right(ends, row) for row in self.poisoned}

    def row_id(self, row: int) -> str:
        """Return the id of a document."""
        return f"{self.input.stem}-{row}"


def make_task(folder: Path, number: int, n_batches: int, poison: bool, seed: int) -> Task:
    """Write the input of one job."""
    rng = random.Random(f"{seed}/{number}")
    n_texts = n_batches * BATCH_TEXTS - rng.randrange(BATCH_TEXTS)
    texts = [_text(rng, number, row) for row in range(n_texts)]
    n_poisoned = n_batches // POISON_EVERY + (rng.random() < n_batches / POISON_EVERY % 1)
    poisoned = frozenset(rng.sample(range(n_texts), n_poisoned)) if poison else frozenset[int]()
    for row in poisoned:
        texts[row] = f"embedq-fault:{rng.choice(POISONS)} {number} {row}"
    task = Task(folder / f"job{number}.jsonl", folder / f"job{number}.npy", texts, poisoned)
    with task.input.open("w", encoding="utf-8") as out:
        for row, text in enumerate(texts):
            out.write(json.dumps({"id": task.row_id(row), "text": text}) + "\n")
    return task


def _text(rng: random.Random, number: int, row: int) -> str:
    if rng.random() < 0.02:
        return "a text that many documents share"
    words = (
        rng.choice(("рядок", "text", "vector", "木", "queue")) for _ in range(rng.randint(1, 20))
    )
    return f"{number} {row} {' '.join(words)}"


class Producer:
    """A process of `embedq embed` that runs one job after the other."""

    def __init__(self, tasks: Iterator[Task], log_path: Path, urls: dict[str, str], model: str):
        self._tasks = tasks
        self._environment = environment(
            **urls,
            EMBEDQ_MODEL=model,
            EMBEDQ_BATCH_TEXTS=str(BATCH_TEXTS),
            EMBEDQ_VISIBILITY_TIMEOUT_S=SHORTENED["EMBEDQ_VISIBILITY_TIMEOUT_S"],
        )
        self.log_path = log_path
        self.task: Task | None = None
        self.done: list[Task] = []
        self.peak_rss_bytes = 0
        #: Reason -> jobs refused before they began, and running jobs given up.
        self.refused: Counter[str] = Counter()
        self.gave_up: Counter[str] = Counter()
        self._process: subprocess.Popen[bytes] | None = None
        self._start_at = 0.0
        self._begun = self._killed = False

    def poll(self, *, more: bool) -> None:
        """Start, resume or finish a job; without `more`, start no further one."""
        if self._process is not None:
            self._check(self._process)
        elif self.task is None and more:
            self.task = next(self._tasks)
            self._start(self.task)
        elif self.task is not None and time.monotonic() >= self._start_at:
            self._start(self.task)

    def is_idle(self) -> bool:
        """Return whether no job is running or waits to be resumed."""
        return self.task is None

    def kill(self) -> bool:
        """Send SIGKILL to the command; `poll` restarts it."""
        if self._process is None or self._process.poll() is not None:
            return False
        self._killed = True
        os.killpg(self._process.pid, signal.SIGKILL)
        return True

    def embed(self, task: Task, output: Path) -> int:
        """Run the command to its end and return its exit code."""
        with self.log_path.open("ab") as log:
            command = self._command(task.input, output)
            return subprocess.run(command, env=self._environment, stdout=log, stderr=log).returncode

    def _command(self, source: Path, output: Path) -> list[str]:
        return [sys.executable, "-m", "embedq", "embed", str(source), "-o", str(output)]

    def _start(self, task: Task) -> None:
        self._begun = self._killed = False
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(task.input, task.output),
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _check(self, process: subprocess.Popen[bytes]) -> None:
        assert self.task is not None
        code = process.poll()
        self._note_job(self.task)
        if code is None:
            self._measure(process.pid)
            return
        self._process = None
        self._start_at = time.monotonic() + RESTART_DELAY_S
        if code in (EXIT_OK, EXIT_FAILED) and self._manifest(self.task).get("complete"):
            self.done.append(self.task)
            self.task = None
        elif not self._killed:
            last = self._last_log_line()
            refused = not self._begun or "accepts no new job" in last
            (self.refused if refused else self.gave_up)[f"exit {code}: {last}"] += 1

    def _note_job(self, task: Task) -> None:
        if (job := self._manifest(task).get("job")) and job not in task.jobs:
            task.jobs.add(job)
            task.job = job
            self._begun = True

    def _manifest(self, task: Task) -> dict[str, Any]:
        with suppress(OSError):
            manifest: dict[str, Any] = json.loads(manifest_path(task.output).read_text())
            return manifest
        return {}

    def _measure(self, pid: int) -> None:
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            peak = next(line for line in lines if line.startswith("VmHWM"))
            self.peak_rss_bytes = max(self.peak_rss_bytes, int(peak.split()[1]) * 1024)

    def _last_log_line(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()
        last = lines[-1] if lines else ""
        # Without paths and numbers, so that equal reasons are counted together.
        words = (word for word in last.split() if not any(c in "/0123456789" for c in word))
        return " ".join(words)[:100]
