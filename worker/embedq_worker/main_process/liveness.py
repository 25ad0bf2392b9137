"""Liveness file and health check; standard library only.

The small file by which a node shows that it lives, and what may be concluded from it.

Standard library only: a health check runs every few seconds, and must not cost more than it tells.

`embedq-worker health`: should this node be started anew? Standard library only, for it is quick.

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


#: Seconds that a node may be silent for longer while it waits for its broker: one try to connect
#: may wait for an answer twice.
BROKER_WAIT_S: Final = 65.0


class Pulse(NamedTuple):  # a dataclass would cost the check a sixth of its time
    """A node at one moment; times are seconds of the machine's monotonic clock.

    Attributes:
        node: its name.
        at: when this was written.
        pid, child: of its parent process, and of its child; 0 for none.
        state, reason: as in its heartbeat.
        crash_loop: its children die again and again before they are ready.
        connected: it hears its broker.
        batch_since: when its oldest batch in hand was begun; None without one.
        engine_since: when its engine began what it is at; None while it is at nothing.
        engine_deadline_s: what the engine may take.
    """

    node: str
    at: float
    pid: int = 0
    child: int = 0
    state: str = "starting"
    reason: str = ""
    crash_loop: bool = False
    connected: bool = False
    batch_since: float | None = None
    engine_since: float | None = None
    engine_deadline_s: float = 0.0

    def objection(self, now_s: float, max_age_s: float) -> str | None:
        """Say why this node should be started anew, or None if it should not.

        A degraded node serves, and a node without its broker connects again by itself, so neither
        is a reason.
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
            if busy_s > self.engine_deadline_s + GRACE_S:
                return (
                    f"its engine has been at one batch for {busy_s:.0f} s; the deadline is "
                    f"{self.engine_deadline_s:.0f} s (EMBEDQ_ENGINE_DEADLINE_S)"
                )
        return None

    def may_serve(self) -> bool:
        """Tell whether batches can reach this node and be answered now."""
        return self.connected and self.state in ("healthy", "degraded")


def write(folder: Path, pulse: Pulse) -> None:
    """Replace a node's file.

    Raises:
        OSError: it cannot be written.
    """
    path = folder / (pulse.node + SUFFIX)
    replace_private(path, json.dumps(pulse._asdict()).encode())


def read_all(folder: Path, node: str = "") -> Iterator[Pulse]:
    """Yield the pulse of a node, or of all nodes of a folder; what cannot be read is left out."""
    paths = [folder / (node + SUFFIX)] if node else sorted(folder.glob("*" + SUFFIX))
    for path in paths:
        try:
            body = json.loads(path.read_bytes())
            yield Pulse(**{key: value for key, value in body.items() if key in Pulse._fields})
        except (OSError, ValueError, TypeError, AttributeError):
            continue


#: Exit codes.
WELL, UNWELL = 0, 1


HELP: Final = "Say whether the nodes of this machine live: exit code 0, or 1 and why."


def main(arguments: list[str]) -> int:
    """Check and return the exit code."""
    parser = argparse.ArgumentParser("embedq-worker health", description=HELP)
    parser.add_argument("--max-age-s", type=float, default=30.0, help="Oldest sign of life.")
    parser.add_argument("--json", action="store_true", help="One JSON object with readiness.")
    parser.add_argument("--name", default="", help="Of several nodes, only this. [EMBEDQ_NAME]")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("EMBEDQ_RUNTIME_DIR") or default_runtime_dir())
    name = options.name or os.environ.get("EMBEDQ_NAME", "")
    found = [_judge(each, options.max_age_s) for each in read_all(folder, name)]
    well = bool(found) and all(node["well"] for node in found)
    if options.json:
        ready = well and all(node["ready"] for node in found)
        print(json.dumps({"well": well, "ready": ready, "nodes": found}))
    elif not found:
        print(f"no node{' ' + name if name else ''} has run in {folder} (EMBEDQ_RUNTIME_DIR)")
    else:
        for node in found:
            print(f"{node['node']} {node['state']}: {node['objection'] or 'lives'}")
    return WELL if well else UNWELL


def _judge(node: Pulse, max_age_s: float) -> dict[str, Any]:
    now_s = time.monotonic()
    objection = node.objection(now_s, max_age_s)
    shown = node._asdict()
    for key in ("at", "batch_since", "engine_since"):
        since_s = shown.pop(key)
        # Ages, for the clock itself means nothing to anybody else.
        name = {"at": "age_s"}.get(key, key.replace("since", "age_s"))
        shown[name] = None if since_s is None else round(now_s - since_s, 3)
    return {
        **shown,
        "well": objection is None,
        "ready": objection is None and node.may_serve(),
        "objection": objection or "",
    }
