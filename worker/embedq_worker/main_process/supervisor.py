"""Start a worker's main process, restart it when it crashes, and forward signals to it.

The main process is a fork of this one, which imports almost nothing, so a restart is as clean as
the first start. It leads its own process group: Ctrl-C reaches it once, through the supervisor, and
what it leaves behind is killed as a whole.

    supervisor          10 MB; reaps every process, also as process 1 of a container
    └─ main process     Celery; the kernel kills it when the supervisor dies
       └─ pool process  owns the device; the kernel kills it when the main process dies
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable

from embedq_worker import exit_codes

#: Crashes within a period, seconds, that are a crash loop.
CRASHES, WINDOW_S = 5, 60.0

#: First and longest delay before a restart, seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0

#: Signals that stop a worker -> the signal that the main process gets.
STOPS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGQUIT,
}

#: Both ends of a pipe that closes when the supervisor dies; empty on Linux, where the kernel kills
#: the main process.
_parent_pipe: list[int] = []

#: Runs the main process with these additional arguments; never returns.
Run = Callable[[list[str]], object]


class SupervisedProcess:
    """The main process of one worker."""

    def __init__(self, run: Run, arguments: tuple[str, ...] = ()) -> None:
        self._run = run
        self._arguments = arguments
        self._crashes: list[float] = []
        self._starts = 0
        self._npu_off = False
        self.name = arguments[-1] if arguments else "worker"
        self.pid = 0
        self.due_at = 0.0
        self.code: int | None = None

    def start(self) -> None:
        """Fork the main process."""
        arguments = [*self._arguments, "--attempt", str(self._starts)]
        if self._npu_off:
            arguments += ["--npu-off"]
        self._starts += 1
        supervisor = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become_worker(supervisor)
            self._run(arguments)
            os._exit(exit_codes.FAILURE)  # a run that returns must not become a second supervisor
        _quietly(os.setpgid, self.pid, self.pid)  # in both processes, as either may run first

    def send(self, number: int) -> None:
        """Forward a signal."""
        if self.pid:
            _quietly(os.kill, self.pid, number)

    def ended(self, status: int, stopping: bool) -> None:
        """Handle the exit of the process, and decide whether it is restarted."""
        _quietly(os.killpg, self.pid, signal.SIGKILL)  # the rest of its process group
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        if stopping:
            by_signal = code in (-signal.SIGTERM, -signal.SIGINT)  # before its handlers were set
            self.code = exit_codes.OK if by_signal else code if code >= 0 else 128 - code
        elif code == exit_codes.CRASH_LOOP:
            self._without_npu(code)
        elif code in exit_codes.FINAL:
            self.code = code
            if code and self.name != "worker":  # the other worker of --all may run on
                _log("ERROR", f"worker_ended worker={self.name} exit_code={code}")
        else:
            self._crashed(code)

    def _crashed(self, code: int) -> None:
        now = time.monotonic()
        self._crashes = [at for at in self._crashes if now - at < WINDOW_S] + [now]
        crashes = len(self._crashes)
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        if crashes >= CRASHES:
            _log("ERROR", f"worker_crash_loop worker={self.name} crashes={crashes} last={why!r}")
            self._without_npu(exit_codes.CRASH_LOOP)
            return
        pause_s = min(FIRST_PAUSE_S * 2 ** (crashes - 1), LONGEST_PAUSE_S)
        self.due_at = now + pause_s
        _log(
            "WARNING",
            f"worker_process_exited worker={self.name} reason={why!r} restart_in_s={pause_s:.1f}",
        )

    def _without_npu(self, code: int) -> None:
        # Restarts once; a worker without an NPU, or a strict one, then exits.
        if self._npu_off:
            self.code = code
        self._npu_off, self._crashes, self.due_at = True, [], 0.0


def supervise(workers: list[SupervisedProcess]) -> int:
    """Run workers until none is to be restarted.

    Returns:
        The first exit code that is not 0, of the workers that ran when the first signal arrived.
    """
    wakeup = _signals_as_bytes()
    if sys.platform != "linux":
        _parent_pipe.extend(os.pipe())
    stopping = 0
    deciding = workers
    while any(worker.code is None for worker in workers):
        for worker in workers:
            if worker.code is None and not worker.pid and worker.due_at <= time.monotonic():
                worker.start()
        for number in _wait_for_signals(wakeup, workers):
            if number in STOPS:
                if not stopping:
                    deciding = [worker for worker in workers if worker.code is None]
                stopping += 1
                # As in Celery: the first Ctrl-C is a warm shutdown, the second a cold one.
                again = number == signal.SIGINT and stopping > 1
                _stop(workers, signal.SIGQUIT if again else STOPS[signal.Signals(number)])
            elif number == signal.SIGUSR1:
                for worker in workers:
                    worker.send(number)
        _reap(workers, stopping > 0)
    return next((worker.code for worker in deciding if worker.code), exit_codes.OK)


def _stop(workers: list[SupervisedProcess], number: int) -> None:
    for worker in workers:
        if not worker.pid and worker.code is None:
            worker.code = exit_codes.OK  # it was waiting for its restart and holds no batch
        worker.send(number)


def _wait_for_signals(wakeup: int, workers: list[SupervisedProcess]) -> bytes:
    due = [worker.due_at for worker in workers if worker.code is None and not worker.pid]
    timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
    ready, _, _ = select.select([wakeup], [], [], timeout_s)
    return os.read(wakeup, 4096) if ready else b""


def _reap(workers: list[SupervisedProcess], stopping: bool) -> None:
    # Includes orphans, which process 1 of a container inherits.
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        for worker in workers:
            if worker.pid == pid:
                worker.ended(status, stopping)


def _signals_as_bytes() -> int:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*STOPS, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    return reader


def _become_worker(supervisor: int) -> None:
    signal.set_wakeup_fd(-1)
    for number in (*STOPS, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    if _parent_pipe:
        _die_when_closed(*_parent_pipe)
    else:
        from embedq_worker.process import (
            die_with_parent,
        )  # imported here to keep the supervisor small

        die_with_parent()
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(exit_codes.FAILURE)


def _die_when_closed(reader: int, writer: int) -> None:
    import threading  # imported here to keep the supervisor small

    def watch() -> None:
        os.read(reader, 1)
        os.killpg(0, signal.SIGKILL)

    os.close(writer)
    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _quietly(call: Callable[[int, int], None], pid: int, value: int) -> None:
    try:
        call(pid, value)
    except (ProcessLookupError, PermissionError):
        return


def _log(level: str, event: str) -> None:
    # In the format of embedq_worker.process; importing logging would double this process.
    now = time.time()
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    os.write(2, f"{at},{int(now * 1000) % 1000:03d} {level} {os.getpid()} {event}\n".encode())
