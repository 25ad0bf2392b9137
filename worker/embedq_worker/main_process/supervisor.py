"""Keep a worker running: start it, start it again when it crashes, pass signals on.

The worker is a fork of this process, which has imported next to nothing: it costs no second start
of Python, and every restart begins as fresh as the first. The worker leads a process group of its
own, so that Ctrl-C reaches it once, through here, and what it leaves behind can be ended as a
whole.

    supervisor          10 MB; reaps everything, also as process 1 of a container
    └─ worker             Celery's parent; the kernel kills it when the supervisor dies
       └─ child         owns the device; the kernel kills it when the worker dies
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable

from embedq_worker import exit_codes

#: A worker that died this often within this many seconds is in a crash loop.
CRASHES, WINDOW_S = 5, 60.0


#: First and longest pause before a worker is started again, in seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


#: Signals that end a worker in good order, and what the worker gets for each.
STOPS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGQUIT: signal.SIGQUIT,
}


#: Both ends of a pipe whose end tells a worker that the supervisor died; on Linux the kernel tells.
_parent_pipe: list[int] = []


#: Runs a worker with these further arguments in the process of its own; never returns.
Run = Callable[[list[str]], object]


class SupervisedProcess:
    """One worker and what became of it."""

    def __init__(self, run: Run, arguments: tuple[str, ...] = ()) -> None:
        self._run = run
        self._arguments = arguments
        self._deaths: list[float] = []
        self._starts = 0
        self._off = False
        self.name = arguments[-1] if arguments else "worker"
        self.pid = 0
        self.due_at = 0.0
        self.code: int | None = None

    def start(self) -> None:
        """Fork the worker."""
        arguments = [*self._arguments, "--attempt", str(self._starts)]
        if self._off:
            arguments += ["--npu-off"]
        self._starts += 1
        supervisor = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _become_worker(supervisor)
            self._run(arguments)
            os._exit(exit_codes.FAILURE)  # a run that returns must not become a second supervisor
        _quietly(os.setpgid, self.pid, self.pid)  # in the worker too: whoever is first

    def send(self, number: int) -> None:
        """Pass a signal on to the worker."""
        if self.pid:
            _quietly(os.kill, self.pid, number)

    def ended(self, status: int, stopping: bool) -> None:
        """Take note of the worker's end, and decide whether it starts again."""
        _quietly(os.killpg, self.pid, signal.SIGKILL)  # what it left behind
        self.pid = 0
        code = os.waitstatus_to_exitcode(status)
        if stopping:
            asked = code in (-signal.SIGTERM, -signal.SIGINT)  # before it could handle them
            self.code = exit_codes.OK if asked else code if code >= 0 else 128 - code
        elif code == exit_codes.CRASH_LOOP:
            self._without_npu(code)
        elif code in exit_codes.FINAL:
            self.code = code
            if code and self.name != "worker":  # the other part may go on for days
                _log("ERROR", f"node_ended worker={self.name} exit_code={code}")
        else:
            self._crashed(code)

    def _crashed(self, code: int) -> None:
        now = time.monotonic()
        self._deaths = [at for at in self._deaths if now - at < WINDOW_S] + [now]
        deaths = len(self._deaths)
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        if deaths >= CRASHES:
            _log("ERROR", f"worker_crash_loop worker={self.name} deaths={deaths} last={why!r}")
            self._without_npu(exit_codes.CRASH_LOOP)
            return
        pause_s = min(FIRST_PAUSE_S * 2 ** (deaths - 1), LONGEST_PAUSE_S)
        self.due_at = now + pause_s
        _log(
            "WARNING",
            f"worker_process_exited worker={self.name} reason={why!r} restart_in_s={pause_s:.1f}",
        )

    def _without_npu(self, code: int) -> None:
        """Start once more on the CPU; the worker itself refuses if it has no NPU or is strict."""
        if self._off:
            self.code = code
        self._off, self._deaths, self.due_at = True, [], 0.0


def supervise(workers: list[SupervisedProcess]) -> int:
    """Run workers until they have ended for good; return the exit code of the one that decides."""
    wakeup = _signals_as_bytes()
    if sys.platform != "linux":
        _parent_pipe.extend(os.pipe())
    stopping = 0
    deciding = workers
    while any(worker.code is None for worker in workers):
        for worker in workers:
            if worker.code is None and not worker.pid and worker.due_at <= time.monotonic():
                worker.start()
        for number in _wait(wakeup, workers):
            if number in STOPS:
                if not stopping:  # one that had ended before is no news now
                    deciding = [worker for worker in workers if worker.code is None]
                stopping += 1
                # Celery's own rule: once ends in good order, twice ends now.
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
            worker.code = exit_codes.OK  # it was waiting for its restart, with nothing in hand
        worker.send(number)


def _wait(wakeup: int, workers: list[SupervisedProcess]) -> bytes:
    """Sleep until a signal comes or a worker is due; return the signals."""
    due = [worker.due_at for worker in workers if worker.code is None and not worker.pid]
    timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
    ready, _, _ = select.select([wakeup], [], [], timeout_s)
    return os.read(wakeup, 4096) if ready else b""


def _reap(workers: list[SupervisedProcess], stopping: bool) -> None:
    """Take the status of every process that ended, also of orphans that process 1 inherits."""
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
    """Turn signals into bytes on a pipe, and return the end to read."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (*STOPS, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    return reader


def _become_worker(supervisor: int) -> None:
    """Undo what makes a supervisor, and arrange to die with it."""
    signal.set_wakeup_fd(-1)
    for number in (*STOPS, signal.SIGCHLD, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    if _parent_pipe:
        _die_at_its_end(*_parent_pipe)
    else:
        from embedq_worker.process import die_with_parent  # here: the supervisor does without

        die_with_parent()
    if os.getppid() != supervisor:  # it died before the line above
        os._exit(exit_codes.FAILURE)


def _die_at_its_end(reader: int, writer: int) -> None:
    """Kill this group when the supervisor's end of the pipe closes, where no kernel does it."""
    import threading  # here: the supervisor does without

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
    """Log as embedq_worker.process does; the logging package would double this process."""
    now = time.time()
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    os.write(2, f"{at},{int(now * 1000) % 1000:03d} {level} {os.getpid()} {event}\n".encode())
