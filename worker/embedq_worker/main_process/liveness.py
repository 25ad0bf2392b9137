"""Liveness file and health check; standard library only.

The small file by which a worker shows that it lives, and what may be concluded from it.

Standard library only: a health check runs every few seconds, and must not cost more than it tells.

`embedq-worker health`: should this worker be started anew? Standard library only, for it is quick.

Containers ask it every few seconds: `celery inspect ping` costs more than a second of processor
each time, and the parent answers it while its child hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from embedq_worker.files import default_runtime_dir, replace_private

SUFFIX: Final = ".pulse"


#: Seconds beyond its own deadline after which an engine counts as stuck: the deadline should have
#: ended its process.
GRACE_S: Final = 30.0


#: Seconds that a worker may be silent for longer while it waits for its broker: one try to connect
#: may wait for an answer twice.
BROKER_WAIT_S: Final = 65.0


class Liveness(NamedTuple):  # a dataclass would cost the check a sixth of its time
    """A worker at one moment; times are seconds of the machine's monotonic clock.

    Attributes:
        worker: its name.
        at: when this was written.
        pid, child: of its parent process, and of its child; 0 for none.
        state, reason: as in its heartbeat.
        crash_loop: its children die again and again before they are ready.
        connected: it hears its broker.
        batch_since: when its oldest batch in hand was begun; None without one.
        engine_since: when its engine began what it is at; None while it is at nothing.
        engine_timeout_s: what the engine may take.
    """

    worker: str
    at: float
    pid: int = 0
    child: int = 0
    state: str = "starting"
    reason: str = ""
    crash_loop: bool = False
    connected: bool = False
    batch_since: float | None = None
    engine_since: float | None = None
    engine_timeout_s: float = 0.0

    def unhealthy_reason(self, now_s: float, max_age_s: float) -> str | None:
        """Say why this worker should be started anew, or None if it should not.

        A degraded worker serves, and a worker without its broker connects again by itself, so
        neither is a reason.
        """
        age_s = now_s - self.at
        limit_s = max_age_s + (0.0 if self.connected else BROKER_WAIT_S)
        if age_s < 0:
            return "its sign of life is from before this machine was started"
        if age_s > limit_s:
            return f"its last sign of life is {age_s:.0f} s old; the limit is {limit_s:.0f} s"
        if self.crash_loop:
            return "its child dies again and again before it is ready; the log says of what"
        if self.engine_since is not None:
            busy_s = now_s - self.engine_since
            if busy_s > self.engine_timeout_s + GRACE_S:
                return (
                    f"its engine has been at one batch for {busy_s:.0f} s; the deadline is "
                    f"{self.engine_timeout_s:.0f} s (EMBEDQ_ENGINE_TIMEOUT_S)"
                )
        return None

    def is_ready(self) -> bool:
        """Tell whether batches can reach this worker and be answered now."""
        return self.connected and self.state in ("healthy", "degraded")


def write(folder: Path, pulse: Liveness) -> None:
    """Replace a worker's file.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / (pulse.worker + SUFFIX)
    replace_private(path, json.dumps(pulse._asdict()).encode())


def read_all(folder: Path, worker: str = "") -> Iterator[Liveness]:
    """Yield the pulse of a worker, or of all workers of a folder; what cannot be read is left
    out.
    """
    paths = [folder / (worker + SUFFIX)] if worker else sorted(folder.glob("*" + SUFFIX))
    for path in paths:
        try:
            body = json.loads(path.read_bytes())
            yield Liveness(**{key: value for key, value in body.items() if key in Liveness._fields})
        except (OSError, ValueError, TypeError, AttributeError):
            continue


#: Exit codes.
WELL, UNWELL = 0, 1


HELP: Final = "Say whether the workers of this machine live: exit code 0, or 1 and why."


def main(arguments: list[str]) -> int:
    """Check and return the exit code."""
    parser = argparse.ArgumentParser("embedq-worker health", description=HELP)
    parser.add_argument("--max-age-s", type=float, default=30.0, help="Oldest sign of life.")
    parser.add_argument("--json", action="store_true", help="One JSON object with readiness.")
    parser.add_argument("--name", default="", help="Of several workers, only this. [EMBEDQ_NAME]")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("EMBEDQ_RUNTIME_DIR") or default_runtime_dir())
    name = options.name or os.environ.get("EMBEDQ_NAME", "")
    found = [_judge(each, options.max_age_s) for each in read_all(folder, name)]
    well = bool(found) and all(worker["well"] for worker in found)
    if options.json:
        ready = well and all(worker["ready"] for worker in found)
        print(json.dumps({"well": well, "ready": ready, "workers": found}))
    elif not found:
        print(f"no worker{' ' + name if name else ''} has run in {folder} (EMBEDQ_RUNTIME_DIR)")
    else:
        for worker in found:
            print(f"{worker['worker']} {worker['state']}: {worker['unhealthy_reason'] or 'lives'}")
    return WELL if well else UNWELL


def _judge(worker: Liveness, max_age_s: float) -> dict[str, Any]:
    now_s = time.monotonic()
    objection = worker.unhealthy_reason(now_s, max_age_s)
    shown = worker._asdict()
    for key in ("at", "batch_since", "engine_since"):
        since_s = shown.pop(key)
        # Ages, for the clock itself means nothing to anybody else.
        name = {"at": "age_s"}.get(key, key.replace("since", "age_s"))
        shown[name] = None if since_s is None else round(now_s - since_s, 3)
    return {
        **shown,
        "well": objection is None,
        "ready": objection is None and worker.is_ready(),
        "unhealthy_reason": objection or "",
    }
