"""A lock between processes that ends with its holder, for work that only one should do."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

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
