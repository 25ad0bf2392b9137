"""The small file by which the child of a node tells its parent how it is.

The parent never loads a model or a runtime, and the child may die at any moment, so they share a
file that is replaced atomically in a private folder.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path

import msgpack

from embedq.card import ModelCard
from embedq.errors import SettingsError
from embedq_worker.private_files import folder_error, replace_private


class State(StrEnum):
    """States of a node."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    PROBING = "probing"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class NodeState:
    """How a node is.

    Attributes:
        state: starting, healthy, degraded, probing or failed.
        reason: why it is not healthy; a sentence.
        since: Unix time of the last change of state, in seconds.
        pid: of the child that wrote this.
        device, engine, precision: what computes; empty while nothing does.
        home: the device that the node is for; another than `device` while it is degraded.
        may_return: a degraded NPU will be tried again.
        card: the model served.
        code: why it is not healthy, in a word.
        count: how often its NPU was given up in a row.
        probe_at: Unix time of the next probe, in seconds; 0 while none is planned.
        busy_since: monotonic seconds at which the engine was called; 0 while it rests.
        pace_s: seconds that an inference took at first; 0 until that is known.
    """

    state: State
    since: float
    pid: int
    reason: str = ""
    device: str = ""
    engine: str = ""
    precision: str = ""
    card: ModelCard | None = None
    home: str = ""
    may_return: bool = False
    code: str = ""
    count: int = 0
    probe_at: float = 0.0
    busy_since: float = 0.0
    pace_s: float = 0.0

    def now(self, state: State, reason: str = "", code: str = "") -> NodeState:
        """Return this state changed at this moment."""
        return replace(self, state=state, reason=reason, code=code, since=time.time())


class StateFile:
    """One node's state file."""

    def __init__(self, runtime_dir: Path, node: str) -> None:
        """Prepare the folder of a node.

        Raises:
            SettingsError: the folder cannot be made private.
        """
        self._path = private_dir(runtime_dir) / f"{node}.state"

    def write(self, state: NodeState) -> None:
        """Replace the file, in a folder made anew where one was cleared away.

        Raises:
            OSError, SettingsError: it cannot be written.
        """
        private_dir(self._path.parent)
        replace_private(self._path, msgpack.packb(asdict(state)))

    def read(self) -> NodeState | None:
        """Return what the file says, or None if there is none to be read."""
        try:
            body = msgpack.unpackb(self._path.read_bytes())
            known = {f.name for f in fields(NodeState)}
            body = {key: value for key, value in body.items() if key in known}
            card = body.pop("card", None)
            state = State(body.pop("state"))
            return NodeState(state, card=ModelCard(**card) if card else None, **body)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
            return None

    def remove(self) -> None:
        """Remove the file; a missing one is fine."""
        self._path.unlink(missing_ok=True)


def private_dir(path: Path) -> Path:
    """Make a folder of our own, 0700, and refuse one that another user could have prepared.

    Raises:
        SettingsError: it is a link, belongs to someone else, is open to others, or cannot be made.
    """
    if error := folder_error(path):
        raise SettingsError(error)
    return path
