"""Locks, private files and digests; standard library only.

Small files that only this user may have written: read if that is so, replaced in one step.

A lock between processes that ends with its holder, for work that only one should do.

sha256 of large files, remembered between starts: hashing 90 MB costs a start 0.2 to 0.3 s.

A memory of a digest is used only while path, size, modification time and inode are the same, and
only from a file that this user owns and nobody else can write.

Where a worker's small files are when nobody says otherwise. Standard library only: health asks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from embedq.errors import SettingsError
from embedq_worker.errors import ModelError


def read_private(path: Path, max_bytes: int) -> bytes | None:
    """Return the start of a file, or None if there is none or others could have written it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        return file.read(max_bytes)


def replace_private(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 beside the old one and put it in its place.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        fresh.unlink(missing_ok=True)  # left by a process that was killed
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(fresh, flags, 0o600), "wb") as file:
            file.write(content)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise


def folder_error(path: Path) -> str:
    """Make a folder of mode 0700; return why it is not private to this user, or an empty text."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        return f"{path}: cannot be used as a folder ({error.strerror})."
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return f"{path}: is not a folder of this user. Remove it or name another."
    if found.st_mode & 0o022:
        return f"{path}: others may write to it. Run: chmod 700 {path}"
    return ""


#: Seconds between two tries.
POLL_S: Final = 0.05


#: What a file system without locks answers.
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(path: Path, deadline_s: float) -> Iterator[None]:
    """Hold the lock of a file for as long as the block lasts.

    Where there can be none, on a full or read-only disk, the block runs all the same: to do the
    work twice is better than not at all.

    Raises:
        TimeoutError: another process held it for all this time.
    """
    try:
        flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        yield
        return
    try:
        try:
            wait_for_lock(descriptor, deadline_s)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def wait_for_lock(descriptor: int, deadline_s: float) -> None:
    """Lock an open file for this process alone.

    Raises:
        TimeoutError: another process held it for all this time.
        OSError: the file system has no locks.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"locked for {deadline_s:.0f} s") from None
            time.sleep(POLL_S)


log = logging.getLogger(__name__)


#: Name of the memory inside the cache folder.
FILE_NAME: Final = "digests.json"


#: Most bytes of it; a larger one is not ours.
MAX_BYTES: Final = 1024 * 1024


class DigestCache:
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
            log.debug("digest_cache_write_failed path=%s reason=%s", self._path, error.strerror)


def _read(path: Path) -> dict[str, Any]:
    """Read the memory, or nothing if it is missing, damaged or writable by others."""
    try:
        known = json.loads(read_private(path, MAX_BYTES) or b"{}")
    except ValueError:
        return {}
    return known if isinstance(known, dict) else {}


def default_runtime_dir() -> Path:
    """Return the folder for files that live as long as a worker: short, private, in memory if
    any.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "embedq"
    return Path(tempfile.gettempdir()) / f"embedq-{os.getuid()}"


def private_dir(path: Path) -> Path:
    """Make a folder of our own, 0700, and refuse one that another user could have prepared.

    Raises:
        SettingsError: it is a link, belongs to someone else, is open to others, or cannot be made.
    """
    if error := folder_error(path):
        raise SettingsError(error)
    return path
