"""Status file and counters of the pool process.

The small file by which the child of a worker tells its parent how it is.

The parent never loads a model or a runtime, and the child may die at any moment, so they share a
file that is replaced atomically in a private folder.

What a child has done, in a small file that its parent tells the fleet of.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import msgpack

from embedq.protocol.worker import ModelInfo, WorkerState
from embedq_worker.files import private_dir, replace_private


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """How a worker is.

    Attributes:
        state: starting, healthy, degraded, probing or failed.
        reason: why it is not healthy; a sentence.
        since: Unix time of the last change of state, in seconds.
        pid: of the child that wrote this.
        device, engine, precision: what computes; empty while nothing does.
        home: the device that the worker is for; another than `device` while it is degraded.
        may_return: a degraded NPU will be tried again.
        model_info: the model served.
        code: why it is not healthy, in a word.
        count: how often its NPU was given up in a row.
        probe_at: Unix time of the next probe, in seconds; 0 while none is planned.
        busy_since: monotonic seconds at which the engine was called; 0 while it rests.
        pace_s: seconds that an inference took at first; 0 until that is known.
    """

    state: WorkerState
    state_since: float
    pid: int
    reason: str = ""
    device: str = ""
    engine: str = ""
    precision: str = ""
    model_info: ModelInfo | None = None
    assigned_device: str = ""
    will_retry: bool = False
    code: str = ""
    failure_count: int = 0
    next_probe_at: float = 0.0
    busy_since: float = 0.0
    pace_s: float = 0.0

    def transition(self, state: WorkerState, reason: str = "", code: str = "") -> WorkerStatus:
        """Return this state changed at this moment."""
        return replace(self, state=state, reason=reason, code=code, state_since=time.time())


class StatusFile:
    """One worker's state file."""

    def __init__(self, runtime_dir: Path, worker: str) -> None:
        """Prepare the folder of a worker.

        Raises:
            SettingsError: the folder cannot be made private.
        """
        self._path = private_dir(runtime_dir) / f"{worker}.state"

    def write(self, state: WorkerStatus) -> None:
        """Replace the file, in a folder made anew where one was cleared away.

        Raises:
            OSError, SettingsError: it cannot be written.
        """
        private_dir(self._path.parent)
        replace_private(self._path, msgpack.packb(asdict(state)))

    def read(self) -> WorkerStatus | None:
        """Return what the file says, or None if there is none to be read."""
        try:
            body = msgpack.unpackb(self._path.read_bytes())
            known = {f.name for f in fields(WorkerStatus)}
            body = {key: value for key, value in body.items() if key in known}
            model_info = body.pop("model_info", None)
            state = WorkerState(body.pop("state"))
            return WorkerStatus(
                state, model_info=ModelInfo(**model_info) if model_info else None, **body
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
            return None

    def remove(self) -> None:
        """Remove the file; a missing one is fine."""
        self._path.unlink(missing_ok=True)


SUFFIX: Final = ".tally"


@dataclass(slots=True)
class Counters:
    """Counts of one process, which only rise.

    Attributes:
        redelivered: batches begun that somebody had begun before.
        duplicates: batches computed in vain, for the ledger had them.
        refused: batches answered as failed.
        rerouted: batches handed to another queue.
        set_aside: texts that no process survived.
    """

    redelivered: int = 0
    duplicates: int = 0
    refused: int = 0
    rerouted: int = 0
    set_aside: int = 0
    _path: Path | None = field(default=None, repr=False)
    _totals: dict[str, float] = field(default_factory=dict, repr=False)

    def open(self, folder: Path, worker: str) -> None:
        """Begin the file of this process, without what its parent counted before the fork."""
        for name in self.counts():
            setattr(self, name, 0)
        self._path = folder / (worker + SUFFIX)
        self.write({})

    def write(self, totals: dict[str, float] | None = None) -> None:
        """Replace the file; without a file there is nothing to do.

        Args:
            totals: numbers of the engines, as they stand; None for those of the last time.
        """
        if totals is not None:
            self._totals = totals
        if self._path is None:
            return
        body = {
            "pid": os.getpid(),
            "totals": {**self._totals, **self.counts()},
        }
        try:
            replace_private(self._path, json.dumps(body).encode())
        except OSError:
            return  # a full disk must not fail a batch

    def counts(self) -> dict[str, float]:
        """Return the counts by name."""
        return {
            "redelivered": self.redelivered,
            "duplicates": self.duplicates,
            "refused": self.refused,
            "rerouted": self.rerouted,
            "set_aside": self.set_aside,
        }


#: Of this process.
COUNTERS: Final = Counters()


@dataclass(frozen=True, slots=True)
class Told:
    """What a child's file says.

    Attributes:
        pid: of the child.
        totals: names and numbers.
    """

    pid: int = 0
    totals: dict[str, float] = field(default_factory=dict)


def read_totals(folder: Path, worker: str) -> dict[str, float]:
    """Return what a worker's child last wrote and what this process, its parent, has counted."""
    summed = Counter(COUNTERS.counts())
    summed.update(read(folder, worker).totals)
    return dict(summed)


def read(folder: Path, worker: str) -> Told:
    """Return what a worker's child last wrote; nothing of it if that cannot be read."""
    try:
        body: dict[str, Any] = json.loads((folder / (worker + SUFFIX)).read_bytes())
        return Told(int(body["pid"]), dict(body["totals"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Told()
