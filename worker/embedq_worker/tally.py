"""What a child has done, in a small file that its parent tells the fleet of."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from embedq_worker.private_files import replace_private

SUFFIX: Final = ".tally"


@dataclass(slots=True)
class Tally:
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

    def open(self, folder: Path, node: str) -> None:
        """Begin the file of this process, without what its parent counted before the fork."""
        for name in self.counts():
            setattr(self, name, 0)
        self._path = folder / (node + SUFFIX)
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
TALLY: Final = Tally()


@dataclass(frozen=True, slots=True)
class Told:
    """What a child's file says.

    Attributes:
        pid: of the child.
        totals: names and numbers.
    """

    pid: int = 0
    totals: dict[str, float] = field(default_factory=dict)


def together(folder: Path, node: str) -> dict[str, float]:
    """Return what a node's child last wrote and what this process, its parent, has counted."""
    summed = Counter(TALLY.counts())
    summed.update(read(folder, node).totals)
    return dict(summed)


def read(folder: Path, node: str) -> Told:
    """Return what a node's child last wrote; nothing of it if that cannot be read."""
    try:
        body: dict[str, Any] = json.loads((folder / (node + SUFFIX)).read_bytes())
        return Told(int(body["pid"]), dict(body["totals"]))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return Told()
