"""Small files that only this user may have written: read if that is so, replaced in one step."""

from __future__ import annotations

import os
import stat
import threading
from contextlib import suppress
from pathlib import Path


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
    # Not by tempfile, whose import costs a third of a health check.
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
