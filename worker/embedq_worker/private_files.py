"""Small files that only this user may have written: read if that is so, replaced in one step."""

from __future__ import annotations

import os
import stat
import tempfile
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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
