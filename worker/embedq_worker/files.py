"""Private files and folders, file locks and a cache of digests.

Standard library only: `embedq-worker health`, which runs every few seconds, imports this module.
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

log = logging.getLogger(__name__)

#: Interval of attempts to lock a file, seconds.
POLL_S: Final = 0.05
#: Errors of a file system that has no locks.
_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
#: Maximum size of a private file, bytes; the rest of a larger file is not read.
MAX_BYTES: Final = 1024 * 1024


def read_private(path: Path) -> bytes | None:
    """Return up to MAX_BYTES of a file; None if it is missing or other users may write to it."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return None
        return file.read(MAX_BYTES)


def read_private_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that read_private accepts; empty if there is none."""
    try:
        found = json.loads(read_private(path) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def replace_private(path: Path, content: bytes) -> None:
    """Replace a file atomically by one of mode 0600.

    Raises:
        OSError: the file cannot be written.
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
    """Make a folder of mode 0700; return why it is not private to this user, empty if it is."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        return f"{path} cannot be used as a folder ({error.strerror}). Name another folder."
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return f"{path} is not a folder of this user. Remove it, or name another folder."
    if found.st_mode & 0o022:
        return f"{path} is writable by other users. Run: chmod 700 {path}"
    return ""


@contextmanager
def locked(path: Path, deadline_s: float) -> Iterator[None]:
    """Hold the lock of a file during the block; it ends with the process.

    Where the file cannot be made or locked, as on a read-only disk, the block runs without a lock:
    doing the work twice is better than not at all.

    Raises:
        TimeoutError: another process held the lock for deadline_s seconds.
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
    """Lock an open file exclusively.

    Raises:
        TimeoutError: another process held the lock for deadline_s seconds.
        OSError: the file system has no locks.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"locked by another process for {deadline_s:.0f} s") from None
            time.sleep(POLL_S)


class DigestCache:
    """sha256 of large files, stored between starts.

    An entry is valid while size, modification time and inode of its file are unchanged.
    """

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / "digests.json"

    def of(self, path: Path) -> str:
        """Return the sha256 of a file in hex.

        Raises:
            ModelError: the file cannot be read.
        """
        path = path.resolve()
        try:
            status = path.stat()
            key = [status.st_size, status.st_mtime_ns, status.st_ino]
            known = read_private_json(self._path)
            entry = known.get(str(path))
            if isinstance(entry, list) and entry[:-1] == key and isinstance(entry[-1], str):
                return entry[-1]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        try:
            content = json.dumps({**known, str(path): [*key, digest]})
            replace_private(self._path, content.encode())
        except OSError as error:
            log.debug("digest_cache_write_failed path=%s reason=%s", self._path, error.strerror)
        return digest


def default_runtime_dir() -> Path:
    """Return the default folder for files that last as long as a worker.

    Its path is short enough for Unix sockets.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "embedq"
    return Path(tempfile.gettempdir()) / f"embedq-{os.getuid()}"


def private_dir(path: Path) -> Path:
    """Make a folder of mode 0700 and return it.

    Raises:
        SettingsError: it cannot be made, is a link, or another user owns it or may write to it.
    """
    if error := folder_error(path):
        raise SettingsError(error)
    return path
