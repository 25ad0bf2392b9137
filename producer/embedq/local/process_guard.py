"""Process guard: runs a command and ends it when the process that started the guard ends.

    owner           holds the other end of the guard's stdin
    └─ guard        ends the group when stdin is closed or on SIGTERM
       └─ leader    leads the process group; kills it when the guard dies
          └─ command and its descendants; the kernel kills the command when the leader dies

So no process remains, whichever of them gets SIGKILL. The death of guard and leader is detected on
Linux only. This script runs with -I -S and imports little, to start fast.

Usage: python -I -S process_guard.py GRACE_S -- command argument ...
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable

#: Interval of the checks whether the owner lives, in seconds; a fork of it may hold stdin open.
PARENT_CHECK_S = 1.0

#: Exit code of a command that cannot be executed, as in shells.
CANNOT_EXECUTE = 127

#: Option of prctl(2): signal to receive when the parent thread ends.
PR_SET_PDEATHSIG = 1

#: Signals that guard and leader survive; exec resets them to their default action.
HANDLED_SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    """Run a command until it ends or stdin closes; return its exit code, 128 + n for signal n."""
    if len(arguments) < 3 or arguments[1] != "--":
        raise SystemExit("usage: process_guard.py GRACE_S -- command argument ...")
    grace_s, command = float(arguments[0]), arguments[2:]
    set_death_signal = _death_signal_setter()
    wakeup = _handle_signals()
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        _lead_group(command, guard, set_death_signal)
    group = _Group(pid)
    _wait_for_end(group, wakeup)
    return group.end(grace_s, wakeup)


class _Group:
    """The leader and its descendants."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._status: int | None = None
        _ignore_exited(os.setpgid, leader, leader)  # the leader does the same; either may be first

    def is_running(self) -> bool:
        """Return whether the leader, and so the command, still runs."""
        if self._status is None:
            pid, status = os.waitpid(self._leader, os.WNOHANG)
            self._status = status if pid else None
        return self._status is None

    def end(self, grace_s: float, wakeup: int) -> int:
        """End the group with SIGTERM, then SIGKILL, and return the exit code."""
        deadline = time.monotonic() + grace_s
        if self.is_running():
            self._signal(signal.SIGTERM)
        while self.is_running() and (left := deadline - time.monotonic()) > 0:
            if select.select([wakeup], [], [], left)[0]:
                os.read(wakeup, 4096)
        # The kernel does not reuse the id of a group while it has a member.
        self._signal(signal.SIGKILL)
        if self._status is None:
            _, self._status = os.waitpid(self._leader, 0)
        return _exit_code(self._status)

    def _signal(self, number: int) -> None:
        _ignore_exited(os.killpg, self._leader, number)


def _wait_for_end(group: _Group, wakeup: int) -> None:
    # Returns when the command ended, stdin was closed, SIGTERM arrived or the owner died.
    parent = os.getppid()
    while group.is_running() and os.getppid() == parent:
        ready, _, _ = select.select([0, wakeup], [], [], PARENT_CHECK_S)
        if 0 in ready and not os.read(0, 4096):
            return
        if wakeup in ready and signal.SIGTERM in os.read(wakeup, 4096):
            return


def _lead_group(command: list[str], guard: int, set_death_signal: Callable[[int], None]) -> None:
    signal.set_wakeup_fd(-1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
    set_death_signal(signal.SIGUSR1)
    if os.getppid() != guard:  # it died before the signal was set
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    leader = os.getpid()
    pid = os.fork()
    if pid == 0:
        set_death_signal(signal.SIGKILL)
        if os.getppid() == leader:
            _execute(command)
        os._exit(CANNOT_EXECUTE)
    _, status = os.waitpid(pid, 0)
    os._exit(_exit_code(status))


def _execute(command: list[str]) -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores both; the command must not
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be run: {error.strerror}.\n".encode())


def _handle_signals() -> int:
    # Signals become bytes on a pipe; returns its end to read.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in HANDLED_SIGNALS:
        signal.signal(number, lambda *_: None)
    return reader


def _death_signal_setter() -> Callable[[int], None]:
    # Its result asks the kernel for a signal at the parent's death; on Linux only.
    if not sys.platform.startswith("linux"):
        return lambda number: None
    import ctypes  # here, because only Linux needs it; before any fork

    prctl = ctypes.CDLL(None).prctl
    return lambda number: prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))


def _ignore_exited(call: Callable[[int, int], None], pid: int, value: int) -> None:
    try:
        call(pid, value)
    except (ProcessLookupError, PermissionError):
        # PermissionError: on macOS, the group has only zombies; on Linux, the child has already
        # joined its group.
        return


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
