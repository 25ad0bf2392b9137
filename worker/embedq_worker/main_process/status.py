"""The status file, by which the pool process reports to the main process.

The main process never loads a model or a runtime, and the pool process may die at any moment, so
they share a file in a private folder that is replaced atomically.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from embedq.errors import MalformedMessage
from embedq.protocol.worker import WorkerStatus
from embedq_worker.files import private_dir, replace_private

#: Counters that every process starts at 0:
#: redelivered  batches that another process had started before
#: duplicates   batches computed in vain: the ledger already had them
#: refused      batches committed as failed
#: rerouted     batches published to another queue
#: set_aside    texts that ended every process that computed them
_COUNTS: Final = ("redelivered", "duplicates", "refused", "rerouted", "set_aside")

#: Counters of this process.
COUNTERS: Final[Counter[str]] = Counter(dict.fromkeys(_COUNTS, 0))


def reset_counters() -> None:
    """Set every counter to 0: a forked process starts with the counts of its parent."""
    for name in _COUNTS:
        COUNTERS[name] = 0


class StatusFile:
    """The status file of one worker."""

    def __init__(self, runtime_dir: Path, worker: str) -> None:
        """Prepare the private folder.

        Raises:
            SettingsError: the folder cannot be made private.
        """
        self._path = private_dir(runtime_dir) / f"{worker}.status"

    def write(self, status: WorkerStatus) -> None:
        """Replace the file; its folder is created again if it was deleted.

        Raises:
            OSError, SettingsError: it cannot be written.
        """
        private_dir(self._path.parent)
        replace_private(self._path, status.to_message())

    def read(self) -> WorkerStatus | None:
        """Return the last status, or None if the file is missing or unreadable."""
        try:
            return WorkerStatus.from_message(self._path.read_bytes())
        except (OSError, MalformedMessage):
            return None

    def remove(self) -> None:
        """Delete the file if it exists."""
        self._path.unlink(missing_ok=True)
