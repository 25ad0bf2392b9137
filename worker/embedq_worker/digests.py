"""sha256 of large files, remembered between starts: hashing 90 MB costs a start 0.2 to 0.3 s.

A memory of a digest is used only while path, size, modification time and inode are the same, and
only from a file that this user owns and nobody else can write.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Final

from embedq_worker.errors import ModelError
from embedq_worker.private_files import read_private, replace_private

log = logging.getLogger(__name__)

#: Name of the memory inside the cache folder.
FILE_NAME: Final = "digests.json"
#: Most bytes of it; a larger one is not ours.
MAX_BYTES: Final = 1024 * 1024


class Digests:
    """The sha256 of files, computed once."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / FILE_NAME

    def of(self, path: Path) -> str:
        """Return the sha256 of a file in hex.

        Raises:
            ModelError: the file cannot be read.
        """
        path = path.resolve()
        try:
            status = path.stat()
            key = [status.st_size, status.st_mtime_ns, status.st_ino]
            known = _read(self._path)
            entry = known.get(str(path))
            if isinstance(entry, list) and entry[:-1] == key and isinstance(entry[-1], str):
                return entry[-1]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        self._remember({**known, str(path): [*key, digest]})
        return digest

    def _remember(self, known: dict[str, Any]) -> None:
        """Replace the memory; a cache that cannot be written costs time, nothing else."""
        try:
            replace_private(self._path, json.dumps(known).encode())
        except OSError as error:
            log.debug("digest_not_kept path=%s reason=%s", self._path, error.strerror)


def _read(path: Path) -> dict[str, Any]:
    """Read the memory, or nothing if it is missing, damaged or writable by others."""
    try:
        known = json.loads(read_private(path, MAX_BYTES) or b"{}")
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}
