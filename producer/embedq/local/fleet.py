"""A private Redis and one worker for --local.

A private folder for the sockets and logs of one local run, and the end of forgotten ones.

A child process that cannot outlive this one, with its log in a file.

A private Redis and one worker as child processes, so that embedding needs no running service.

Both live in a folder of their own and talk through a unix socket in it. Neither can outlive this
process, and nothing of them is kept: the truth of a local run is the output that it writes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from embedq.errors import LocalStartFailed
from embedq.local.redis_server import Choice, RedisServer, choose

if sys.platform != "win32":
    import fcntl


#: Start of the names of our folders; a process id and random letters follow.
PREFIX = "embedq-"


#: Longest path of a unix socket that every supported system takes, in bytes (macOS: 103).
MAX_SOCKET_PATH_BYTES = 99


#: Room for our folder and a socket in it, in bytes.
RESERVED_BYTES = 40


#: Characters that mean the same in a path, in a URL and in a Redis option.
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")


class RuntimeDir:
    """A folder of mode 0700 whose lock is held as long as its owner lives.

    Attributes:
        path: the folder; short enough for a unix socket in it.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls) -> RuntimeDir:
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
    def _create_below(cls, base: Path) -> RuntimeDir:
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


#: Seconds beyond the time of grace after which the tether itself is killed.
TETHER_MARGIN_S = 5.0


#: Bytes and lines at the end of a log that an error shows.
TAIL_BYTES, TAIL_LINES = 16_384, 12


_TETHER = Path(__file__).with_name("process_guard.py")


class ManagedProcess:
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


#: Seconds in which the private Redis must answer; fakeredis starts slowest.
READY_DEADLINE_S = 10.0


#: Seconds between two looks whether it answers.
READY_POLL_S = 0.005


#: Seconds that worker and Redis get to end by themselves: none, for neither keeps anything that
#: outlives the run.
GRACE_S = 0.0


#: What the default worker imports and the SDK alone does not bring.
WORKER_REQUIREMENTS = ("embedq_worker", "onnxruntime", "tokenizers", "onnx")


class LocalFleet:
    """The whole of embedq on this machine, for as long as a `with` block lasts."""

    def __init__(
        self,
        *,
        worker_command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        redis: Choice = "auto",
        warn: Callable[[str], None],
    ) -> None:
        """Say what to start; nothing starts yet.

        Args:
            node_command: what to run instead of embedq's own worker on the CPU.
            environment: variables for the worker, on top of this process's own.
            redis: which kind of Redis; auto takes the best there is.
            warn: gets each sentence that the user should read.
        """
        self._worker_command = worker_command
        self._environment = dict(environment or {})
        self._choice = redis
        self._warn = warn
        self._folder: RuntimeDir | None = None
        self._server: RedisServer | None = None
        self._redis: ManagedProcess | None = None
        self._worker: ManagedProcess | None = None

    @property
    def broker_url(self) -> str:
        """Where the batches travel, in Celery's form."""
        return self._started_server().broker_url

    @property
    def results_url(self) -> str:
        """Where the ledger is, in redis-py's form: the same server, another database."""
        return self._started_server().results_url

    @property
    def log_path(self) -> Path:
        """The log of the worker; it goes with the fleet."""
        return self._started_server().socket_path.with_name("worker.log")

    def start(self) -> None:
        """Start Redis and the worker together and wait until Redis answers; the worker takes
        longer.

        Raises:
            LocalStartFailed: something is missing, or ended at once; the message says what to do.
        """
        if self._folder is not None:
            raise RuntimeError("LocalFleet started twice. This is a bug.")
        if os.name == "nt":
            raise LocalStartFailed(
                "embedq runs no worker on Windows. Use WSL 2, or point EMBEDQ_BROKER_URL and "
                "EMBEDQ_RESULTS_URL at a Redis whose workers run on Linux."
            )
        command = self._worker_command or _default_worker()
        try:
            self._folder = RuntimeDir.create()
            self._server = choose(self._choice, self._folder.path)
            self._start_processes(self._server, command)
            self._wait_until_ready(self._server)
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Do nothing while both processes live.

        Raises:
            LocalStartFailed: one has ended; the message shows the end of its log.
        """
        for name, process in (("Redis", self._redis), ("worker", self._worker)):
            code = process.exit_code() if process else None
            if process and code is not None:
                raise LocalStartFailed(
                    f"The private {name} of this run ended with exit code {code}. Mend what its "
                    "log names and run the same command again; it resumes. The last lines:\n"
                    f"{process.last_lines()}"
                )

    def close(self) -> None:
        """End the worker, then Redis, and remove their folder; a second call does nothing."""
        for process in (self._worker, self._redis):
            if process is not None:
                process.end()
        self._worker = self._redis = self._server = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start_processes(self, server: RedisServer, command: Sequence[str]) -> None:
        if server.warning:
            self._warn(server.warning)
        folder = server.socket_path.parent
        self._redis = ManagedProcess(server.command, folder / "redis.log", grace_s=GRACE_S)
        environment = {
            **os.environ,
            **self._environment,
            "EMBEDQ_BROKER_URL": server.broker_url,
            "EMBEDQ_RESULTS_URL": server.results_url,
            # Two local runs of one user both call their worker "local".
            "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "worker"),
            # What Celery's processes leave behind when they are ended goes with our folder.
            "TMPDIR": os.fspath(folder),
        }
        self._worker = ManagedProcess(
            command, self.log_path, grace_s=GRACE_S, environment=environment
        )

    def _wait_until_ready(self, server: RedisServer) -> None:
        deadline = time.monotonic() + READY_DEADLINE_S
        while not server.answers():
            self.check()
            if time.monotonic() > deadline:
                assert self._redis is not None
                raise LocalStartFailed(
                    f"The private Redis ({server.command[0]}) did not answer within "
                    f"{READY_DEADLINE_S:.0f} s. Run the command again on a calmer machine, or set "
                    "EMBEDQ_BROKER_URL to a Redis of your own. The last lines of its log:\n"
                    f"{self._redis.last_lines()}"
                )
            time.sleep(READY_POLL_S)
        self.check()

    def _started_server(self) -> RedisServer:
        if self._server is None:
            raise RuntimeError("LocalFleet is not started; use it in a `with` block.")
        return self._server


def _default_worker() -> tuple[str, ...]:
    """Return the command of a worker on the CPU, once all that it imports is known to be there."""
    missing = [name for name in WORKER_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        raise LocalStartFailed(
            f"A worker on this machine needs {', '.join(missing)}, which this Python does not "
            f"have. "
            "Install it: pip install 'embedq[cpu]'."
        )
    # -P: a celery.py in the current folder must not become part of the worker.
    worker = ("embedq_worker", "start", "--name", "local")
    return (sys.executable, "-P", "-m", *worker)
