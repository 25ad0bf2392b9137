"""A private folder for the sockets and logs of one local run, and the end of forgotten ones."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

from embedq.errors import LocalStartFailed

#: Start of the names of our folders; a process id and random letters follow.
PREFIX = "embedq-"
#: Longest path of a unix socket that every supported system takes, in bytes (macOS: 103).
MAX_SOCKET_PATH_BYTES = 99
#: Room for our folder and a socket in it, in bytes.
RESERVED_BYTES = 40
#: Characters that mean the same in a path, in a URL and in a Redis option.
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")


class RunFolder:
    """A folder of mode 0700 whose lock is held as long as its owner lives.

    Attributes:
        path: the folder; short enough for a unix socket in it.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls) -> RunFolder:
        """Make and lock a new folder, and remove those of runs that have died.

        Raises:
            LocalStartFailed: no place for it can be written.
        """
        bases = list(_bases())
        for base in bases:
            with contextlib.suppress(OSError):
                folder = cls._create_below(base)
                _sweep(bases)
                return folder
        raise LocalStartFailed(
            "No folder for a private Redis can be made: none of TMPDIR, /tmp and XDG_RUNTIME_DIR "
            "is writable and short enough for a socket. Set TMPDIR to such a folder."
        )

    @classmethod
    def _create_below(cls, base: Path) -> RunFolder:
        # Locked under another name first: a sweep never meets an unlocked folder of the living.
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base))
        lock = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        letters = hidden.name.removeprefix(f".{PREFIX}")
        # The process id is for people; the lock alone says whether the run lives.
        return cls(hidden.rename(base / f"{PREFIX}{os.getpid()}-{letters}"), lock)

    def remove(self) -> None:
        """Remove the folder and release its lock; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _bases() -> Iterator[Path]:
    """Yield the folders that may hold ours, best first, without those unfit for a socket."""
    # XDG_RUNTIME_DIR comes last: it is emptied at logout, and a bulk job outlives its login.
    wishes = (os.environ.get("TMPDIR"), "/tmp", os.environ.get("XDG_RUNTIME_DIR"))
    for wish in dict.fromkeys(filter(None, wishes)):
        fits = len(os.fsencode(wish)) + RESERVED_BYTES <= MAX_SOCKET_PATH_BYTES
        if fits and wish.startswith("/") and _PLAIN.fullmatch(wish) and os.access(wish, os.W_OK):
            yield Path(wish)


def _sweep(bases: list[Path]) -> None:
    """Remove our own folders whose owners have died."""
    for base in bases:
        for path in base.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        return
    lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while the owner lives
        shutil.rmtree(path)
    finally:
        os.close(lock)
