"""A child process that cannot outlive this one, with its log in a file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

#: Seconds beyond the time of grace after which the tether itself is killed.
TETHER_MARGIN_S = 5.0
#: Bytes and lines at the end of a log that an error shows.
TAIL_BYTES, TAIL_LINES = 16_384, 12

_TETHER = Path(__file__).with_name("tether.py")


class Tethered:
    """A running command; it ends when told to, or when this process ends in any way.

    Attributes:
        log_path: where its output goes.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        *,
        grace_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a command; grace_s is how long it may take to end once it is told to."""
        self.log_path = log_path
        self._grace_s = grace_s
        tether = (sys.executable, "-I", "-S", os.fspath(_TETHER), str(grace_s), "--")
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                (*tether, *command),
                stdin=subprocess.PIPE,  # its other end closes with this process
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is ours to handle
            )

    def exit_code(self) -> int | None:
        """Return the exit code, 128 + n after signal n, or None while the command runs."""
        return self._process.poll()

    def end(self) -> None:
        """End the command and everything that it started; a second call does nothing."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()  # a fork of this process may hold stdin open as well
        try:
            self._process.wait(self._grace_s + TETHER_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_lines(self) -> str:
        """Return the end of the log, indented."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:]) or "    (it is empty)"
