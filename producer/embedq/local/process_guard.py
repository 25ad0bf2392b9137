"""Keep a command only as long as its owner lives. Runs by itself, with -I -S; imports little.

    owner           holds the other end of the tether's stdin
    └─ tether       ends the group when stdin reaches its end, or when it is told to
       └─ keeper    leads the group; kills it when the tether dies without a word
          └─ command and all that it forks; the kernel kills it when the keeper dies

So nothing stays behind whichever of them is killed with SIGKILL. The deaths of tether and keeper
are noticed on Linux only; elsewhere the death of the owner and an orderly end are covered.

    python -I -S process_guard.py GRACE_S -- command argument ...
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable

#: Seconds between two looks at the parent, in case a fork of the owner keeps stdin open.
PARENT_CHECK_S = 1.0


#: Exit code of a command that cannot be executed, as shells have it.
CANNOT_EXECUTE = 127


#: prctl(2): choose the signal that a process gets when the thread that forked it ends.
PR_SET_PDEATHSIG = 1


#: Signals that the tether and its keeper survive; exec gives them back their default action.
SURVIVED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(arguments: list[str]) -> int:
    """Run a command until it ends or stdin does; return its exit code, 128 + n for signal n."""
    if len(arguments) < 3 or arguments[1] != "--":
        raise SystemExit("usage: process_guard.py GRACE_S -- command argument ...")
    grace_s, command = float(arguments[0]), arguments[2:]
    set_death_signal = _death_signal_setter()
    wakeup = _survive_signals()
    tether = os.getpid()
    pid = os.fork()
    if pid == 0:
        _keep(command, tether, set_death_signal)
    group = _Group(pid)
    _wait_for_a_reason(group, wakeup)
    return group.end(grace_s, wakeup)


class _Group:
    """The keeper and all that descends from it."""

    def __init__(self, keeper: int) -> None:
        self._keeper = keeper
        self._status: int | None = None
        _ignoring_its_end(os.setpgid, keeper, keeper)  # in the keeper too: whoever is first

    def is_running(self) -> bool:
        """Say whether the keeper, and so the command, still runs."""
        if self._status is None:
            pid, status = os.waitpid(self._keeper, os.WNOHANG)
            self._status = status if pid else None
        return self._status is None

    def end(self, grace_s: float, wakeup: int) -> int:
        """End every process of the group, politely at first, and return the exit code."""
        deadline = time.monotonic() + grace_s
        if self.is_running():
            self._signal(signal.SIGTERM)
        while self.is_running() and (left := deadline - time.monotonic()) > 0:
            if select.select([wakeup], [], [], left)[0]:
                os.read(wakeup, 4096)
        # The number of a group stays taken while it has a member, so this meets no stranger.
        self._signal(signal.SIGKILL)
        if self._status is None:
            _, self._status = os.waitpid(self._keeper, 0)
        return _exit_code(self._status)

    def _signal(self, number: int) -> None:
        _ignoring_its_end(os.killpg, self._keeper, number)


def _wait_for_a_reason(group: _Group, wakeup: int) -> None:
    """Return when the command ended, stdin is at its end, SIGTERM came or the parent is gone."""
    parent = os.getppid()
    while group.is_running() and os.getppid() == parent:
        ready, _, _ = select.select([0, wakeup], [], [], PARENT_CHECK_S)
        if 0 in ready and not os.read(0, 4096):
            return
        if wakeup in ready and signal.SIGTERM in os.read(wakeup, 4096):
            return


def _keep(command: list[str], tether: int, set_death_signal: Callable[[int], None]) -> None:
    """Be the keeper: run the command in a group of its own and exit with its code."""
    signal.set_wakeup_fd(-1)
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(0, signal.SIGKILL))
    set_death_signal(signal.SIGUSR1)
    if os.getppid() != tether:  # it died before the line above
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        set_death_signal(signal.SIGKILL)
        if os.getppid() == keeper:
            _execute(command)
        os._exit(CANNOT_EXECUTE)
    _, status = os.waitpid(pid, 0)
    os._exit(_exit_code(status))


def _execute(command: list[str]) -> None:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them; a program should not
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]} cannot be run: {error.strerror}.\n".encode())


def _survive_signals() -> int:
    """Turn signals into bytes on a pipe, and return the end to read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in SURVIVED:
        signal.signal(number, lambda *_: None)
    return reader


def _death_signal_setter() -> Callable[[int], None]:
    """Return what asks the kernel for a signal at the parent's death; on Linux it does."""
    if not sys.platform.startswith("linux"):
        return lambda number: None
    import ctypes  # here, so that no other system pays for it; before any fork

    prctl = ctypes.CDLL(None).prctl
    return lambda number: prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number))


def _ignoring_its_end(call: Callable[[int, int], None], pid: int, value: int) -> None:
    try:
        call(pid, value)
    except (ProcessLookupError, PermissionError):
        # Nobody is left; macOS says "not permitted" of a group that holds only zombies, and
        # Linux of a child that has already made a group.
        return


def _exit_code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
