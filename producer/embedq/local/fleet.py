"""`--local`: starts a private Redis and one worker as child processes.

Both run in a private folder and communicate through a unix socket in it. Process guards end them
when this process ends, however it ends. Nothing in Redis outlives the run: the state of a local run
is the output that it writes.
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
from typing import Self

from embedq.errors import LocalStartFailed
from embedq.local.redis_server import Choice, RedisServer, choose

if sys.platform != "win32":
    import fcntl

#: Prefix of a runtime folder; process id and random letters follow.
PREFIX = "embedq-"

#: Maximum length of a unix socket path on every supported system, in bytes (macOS: 103).
MAX_SOCKET_PATH_BYTES = 99

#: Length that the names of the folder and of a socket in it add to a path, in bytes.
RESERVED_BYTES = 40

#: Characters that need no escaping in a path, a URL or a Redis option.
_PLAIN = re.compile(r"[A-Za-z0-9/._-]+")

#: Time beyond the grace period after which the process guard is killed, in seconds.
GUARD_MARGIN_S = 5.0

#: Maximum bytes and lines from the end of a log in an error message.
TAIL_BYTES, TAIL_LINES = 16_384, 12

_GUARD = Path(__file__).with_name("process_guard.py")

#: Time within which the private Redis must answer, in seconds.
READY_DEADLINE_S = 10.0

#: Interval of the checks whether the private Redis answers, in seconds.
READY_POLL_S = 0.005

#: Time that worker and Redis get to end by themselves, in seconds: none, because neither stores
#: anything that outlives the run.
GRACE_S = 0.0

#: Packages that the default worker imports and the SDK does not install.
WORKER_REQUIREMENTS = ("embedq_worker", "onnxruntime", "tokenizers", "onnx")


class RuntimeDir:
    """A private folder with a lock that shows whether its owner lives.

    Attributes:
        path: the folder, of mode 0700; short enough for a unix socket in it.
    """

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def create(cls) -> RuntimeDir:
        """Create and lock a new folder, and remove the folders of runs that have died.

        Raises:
            LocalStartFailed: no suitable folder is writable.
        """
        bases = list(_bases())
        for base in bases:
            with contextlib.suppress(OSError):
                folder = cls._create_below(base)
                _sweep(bases)
                return folder
        raise LocalStartFailed(
            "No folder for a private Redis can be created: none of TMPDIR, /tmp and "
            "XDG_RUNTIME_DIR is writable and short enough for a socket. Set TMPDIR to such a "
            "folder."
        )

    @classmethod
    def _create_below(cls, base: Path) -> RuntimeDir:
        # Locked before it gets its name, so that a sweep never finds an unlocked folder in use.
        hidden = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=base))
        lock = os.open(hidden / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        letters = hidden.name.removeprefix(f".{PREFIX}")
        # The process id is for people; only the lock shows whether the run lives.
        return cls(hidden.rename(base / f"{PREFIX}{os.getpid()}-{letters}"), lock)

    def remove(self) -> None:
        """Remove the folder and release its lock; a second call does nothing."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def _bases() -> Iterator[Path]:
    # XDG_RUNTIME_DIR comes last: it is emptied at logout, which a bulk job may outlive.
    bases = (os.environ.get("TMPDIR"), "/tmp", os.environ.get("XDG_RUNTIME_DIR"))
    for base in dict.fromkeys(filter(None, bases)):
        fits = len(os.fsencode(base)) + RESERVED_BYTES <= MAX_SOCKET_PATH_BYTES
        if fits and base.startswith("/") and _PLAIN.fullmatch(base) and os.access(base, os.W_OK):
            yield Path(base)


def _sweep(bases: list[Path]) -> None:
    for base in bases:
        for path in base.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                _remove_if_dead(path)


def _remove_if_dead(path: Path) -> None:
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        return
    lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while the owner lives
        shutil.rmtree(path)
    finally:
        os.close(lock)


class ManagedProcess:
    """A command under a process guard, which ends it when this process ends.

    Attributes:
        log_path: file of the command's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        log_path: Path,
        *,
        grace_s: float,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start a command; grace_s is the time between SIGTERM and SIGKILL at its end."""
        self.log_path = log_path
        self._grace_s = grace_s
        guard = (sys.executable, "-I", "-S", os.fspath(_GUARD), str(grace_s), "--")
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                (*guard, *command),
                stdin=subprocess.PIPE,  # closed when this process ends
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # only this process handles Ctrl-C
            )

    def exit_code(self) -> int | None:
        """Return the exit code, 128 + n after signal n; None while the command runs."""
        return self._process.poll()

    def end(self) -> None:
        """End the command and all its descendants; a second call does nothing."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.terminate()  # a fork of this process may still hold stdin open
        try:
            self._process.wait(self._grace_s + GUARD_MARGIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def last_lines(self) -> str:
        """Return the last lines of the log, indented."""
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:]) or "    (the log is empty)"


class LocalFleet:
    """A private Redis and one worker, for the duration of a `with` block."""

    def __init__(
        self,
        *,
        worker_command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        redis: Choice = "auto",
        warn: Callable[[str], None],
    ) -> None:
        """Configure the fleet without starting it.

        Args:
            worker_command: command to run instead of embedq's worker on the CPU.
            environment: variables for the worker, in addition to those of this process.
            redis: kind of Redis; auto chooses the best available.
            warn: called with each warning for the user.
        """
        self._worker_command = worker_command
        self._environment = dict(environment or {})
        self._choice = redis
        self._warn = warn
        self._folder: RuntimeDir | None = None
        self._server: RedisServer | None = None
        self._processes: dict[str, ManagedProcess] = {}

    @property
    def broker_url(self) -> str:
        """URL of the broker, in Celery's form."""
        return self._started_server().broker_url

    @property
    def results_url(self) -> str:
        """URL of the results Redis, in redis-py's form: another database of the same server."""
        return self._started_server().results_url

    @property
    def log_path(self) -> Path:
        """Path of the worker's log; close() deletes it."""
        return self._started_server().socket_path.with_name("worker.log")

    def start(self) -> None:
        """Start Redis and the worker and wait until Redis answers; the worker takes longer.

        Raises:
            LocalStartFailed: a program or package is missing, or Redis or the worker ended.
        """
        if self._folder is not None:
            raise RuntimeError("LocalFleet started twice. This is a bug.")
        if os.name == "nt":
            raise LocalStartFailed(
                "embedq workers do not run on Windows. Use WSL 2, or point EMBEDQ_BROKER_URL and "
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
        """Check that Redis and the worker live.

        Raises:
            LocalStartFailed: one has ended; the message shows its last lines.
        """
        for name, process in self._processes.items():
            if (code := process.exit_code()) is not None:
                raise LocalStartFailed(
                    f"The private {name} of this run ended with exit code {code}. Fix the error in "
                    "its log and run the same command again; it resumes. Last lines of the log:\n"
                    f"{process.last_lines()}"
                )

    def close(self) -> None:
        """End the worker and Redis and remove their folder; a second call does nothing."""
        for process in reversed(self._processes.values()):
            process.end()
        self._processes.clear()
        self._server = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_processes(self, server: RedisServer, command: Sequence[str]) -> None:
        if server.warning:
            self._warn(server.warning)
        folder = server.socket_path.parent
        redis_log = folder / "redis.log"
        self._processes["Redis"] = ManagedProcess(server.command, redis_log, grace_s=GRACE_S)
        environment = {
            **os.environ,
            **self._environment,
            "EMBEDQ_BROKER_URL": server.broker_url,
            "EMBEDQ_RESULTS_URL": server.results_url,
            # Every local run names its worker "local", and names are locked in this folder.
            "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "worker"),
            # Temporary files of a killed worker are removed with the folder.
            "TMPDIR": os.fspath(folder),
        }
        self._processes["worker"] = ManagedProcess(
            command, self.log_path, grace_s=GRACE_S, environment=environment
        )

    def _wait_until_ready(self, server: RedisServer) -> None:
        deadline = time.monotonic() + READY_DEADLINE_S
        while not server.answers():
            self.check()
            if time.monotonic() > deadline:
                raise LocalStartFailed(
                    f"The private Redis ({server.command[0]}) did not answer within "
                    f"{READY_DEADLINE_S:.0f} s. Run the command again when the machine is less "
                    "busy, or set EMBEDQ_BROKER_URL to another Redis. Last lines of the log:\n"
                    f"{self._processes['Redis'].last_lines()}"
                )
            time.sleep(READY_POLL_S)
        self.check()

    def _started_server(self) -> RedisServer:
        if self._server is None:
            raise RuntimeError("LocalFleet is not started; use it in a `with` block.")
        return self._server


def _default_worker() -> tuple[str, ...]:
    missing = [name for name in WORKER_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        raise LocalStartFailed(
            f"A local worker needs {', '.join(missing)}, which is not installed. Run: pip install "
            "'embedq[cpu]'"
        )
    # -P: the worker must not import a celery.py in the current folder.
    return (sys.executable, "-P", "-m", "embedq_worker", "start", "--name", "local")
