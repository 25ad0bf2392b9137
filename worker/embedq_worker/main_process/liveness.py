"""Liveness file of a worker, and `embedq-worker health`, which reads it.

Containers run the health check every few seconds, so this module imports the standard library only.
`celery inspect ping` costs a second of CPU time and is answered while the pool process hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from embedq_worker.files import default_runtime_dir, replace_private

_SUFFIX: Final = ".liveness"

#: Time beyond its timeout after which an engine call counts as stuck, seconds; the timeout should
#: have ended the process before.
GRACE_S: Final = 30.0

#: Additional age of the file that is allowed while the worker waits for its broker, seconds: one
#: attempt to connect may time out twice.
BROKER_WAIT_S: Final = 65.0

#: Exit codes.
ALIVE, NOT_ALIVE = 0, 1

HELP: Final = "Check that the workers of this machine are alive: exit code 0, or 1 with a reason."


@dataclass(frozen=True)
class Liveness:
    """State of a worker at one moment; times are seconds of the machine's monotonic clock.

    Attributes:
        worker: its name.
        at: when this was written.
        pid, pool_pid: process ids of the main process and the pool process; 0 for none.
        state, reason: as in the heartbeat.
        crash_loop: pool processes die repeatedly before they are ready.
        connected: the broker is connected.
        batch_since: when the oldest batch was started; None without a batch.
        engine_since: when the running engine call was started; None without one.
        engine_timeout_s: timeout of an engine call.
    """

    worker: str
    at: float
    pid: int = 0
    pool_pid: int = 0
    state: str = "starting"
    reason: str = ""
    crash_loop: bool = False
    connected: bool = False
    batch_since: float | None = None
    engine_since: float | None = None
    engine_timeout_s: float = 0.0

    def unhealthy_reason(self, now_s: float, max_age_s: float) -> str | None:
        """Return why this worker should be restarted, or None if it should not.

        A degraded worker serves and a worker without its broker reconnects, so neither is a reason.
        """
        age_s = now_s - self.at
        limit_s = max_age_s + (0.0 if self.connected else BROKER_WAIT_S)
        if age_s < 0:
            return "its liveness file is from before this machine was started"
        if age_s > limit_s:
            return f"its liveness file is {age_s:.0f} s old; the limit is {limit_s:.0f} s"
        if self.crash_loop:
            return "its pool process dies repeatedly before it is ready; the log says why"
        if self.engine_since is not None:
            busy_s = now_s - self.engine_since
            if busy_s > self.engine_timeout_s + GRACE_S:
                return (
                    f"its engine has computed one batch for {busy_s:.0f} s; the timeout is "
                    f"{self.engine_timeout_s:.0f} s (EMBEDQ_ENGINE_TIMEOUT_S)"
                )
        return None

    def is_ready(self) -> bool:
        """Return whether batches reach this worker and are computed now."""
        return self.connected and self.state in ("healthy", "degraded")


def write(folder: Path, liveness: Liveness) -> None:
    """Replace a worker's liveness file.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / (liveness.worker + _SUFFIX)
    replace_private(path, json.dumps(asdict(liveness)).encode())


def remove(folder: Path, worker: str) -> None:
    """Delete a worker's liveness file if it exists."""
    (folder / (worker + _SUFFIX)).unlink(missing_ok=True)


def read_all(folder: Path, worker: str = "") -> Iterator[Liveness]:
    """Yield the liveness of one worker or of all in a folder; unreadable files are skipped."""
    paths = [folder / (worker + _SUFFIX)] if worker else sorted(folder.glob("*" + _SUFFIX))
    known = {field.name for field in fields(Liveness)}
    for path in paths:
        try:
            body = json.loads(path.read_bytes())
            yield Liveness(**{key: value for key, value in body.items() if key in known})
        except (OSError, ValueError, TypeError, AttributeError):
            continue


def main(arguments: list[str]) -> int:
    """Run the health check and return its exit code."""
    parser = argparse.ArgumentParser("embedq-worker health", description=HELP)
    parser.add_argument(
        "--max-age-s", type=float, default=30.0, help="Maximum age of the liveness file, seconds."
    )
    parser.add_argument("--json", action="store_true", help="One JSON object with readiness.")
    parser.add_argument("--name", default="", help="Check only this worker. [EMBEDQ_NAME]")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("EMBEDQ_RUNTIME_DIR") or default_runtime_dir())
    name = options.name or os.environ.get("EMBEDQ_NAME", "")
    found = [_describe(each, options.max_age_s) for each in read_all(folder, name)]
    alive = bool(found) and all(worker["alive"] for worker in found)
    if options.json:
        ready = alive and all(worker["ready"] for worker in found)
        print(json.dumps({"alive": alive, "ready": ready, "workers": found}))
    elif not found:
        print(f"no worker{' ' + name if name else ''} has run in {folder} (EMBEDQ_RUNTIME_DIR)")
    else:
        for worker in found:
            print(f"{worker['worker']} {worker['state']}: {worker['unhealthy_reason'] or 'alive'}")
    return ALIVE if alive else NOT_ALIVE


def _describe(worker: Liveness, max_age_s: float) -> dict[str, Any]:
    now_s = time.monotonic()
    unhealthy_reason = worker.unhealthy_reason(now_s, max_age_s)
    shown = asdict(worker)
    for key in ("at", "batch_since", "engine_since"):
        since_s = shown.pop(key)
        # As ages: monotonic times mean nothing outside this machine.
        name = {"at": "age_s"}.get(key, key.replace("since", "age_s"))
        shown[name] = None if since_s is None else round(now_s - since_s, 3)
    return {
        **shown,
        "alive": unhealthy_reason is None,
        "ready": unhealthy_reason is None and worker.is_ready(),
        "unhealthy_reason": unhealthy_reason or "",
    }
