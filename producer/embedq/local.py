"""A private Redis and one node as child processes, so that embedding needs no running service.

Both live in a folder of their own and talk through a unix socket in it. Neither can outlive this
process, and nothing of them is kept: the truth of a local run is the output that it writes.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from embedq.errors import LocalStartFailed
from embedq.redis_server import Choice, RedisServer, choose
from embedq.rundir import RunFolder
from embedq.tethered import Tethered

#: Seconds in which the private Redis must answer; it takes some 30 ms, the stand-in a second.
READY_DEADLINE_S = 10.0
#: Seconds between two looks whether it answers.
READY_POLL_S = 0.005
#: Seconds that node and Redis get to end by themselves: none, for neither keeps anything that
#: outlives the run.
GRACE_S = 0.0
#: What the default node imports and the SDK alone does not bring.
NODE_REQUIREMENTS = ("embedq_worker", "onnxruntime", "tokenizers", "onnx")


class LocalFleet:
    """The whole of embedq on this machine, for as long as a `with` block lasts."""

    def __init__(
        self,
        *,
        node_command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        redis: Choice = "auto",
        warn: Callable[[str], None],
    ) -> None:
        """Say what to start; nothing starts yet.

        Args:
            node_command: what to run instead of embedq's own node on the CPU.
            environment: variables for the node, on top of this process's own.
            redis: which kind of Redis; auto takes the best there is.
            warn: gets each sentence that the user should read.
        """
        self._node_command = node_command
        self._environment = dict(environment or {})
        self._choice = redis
        self._warn = warn
        self._folder: RunFolder | None = None
        self._server: RedisServer | None = None
        self._redis: Tethered | None = None
        self._node: Tethered | None = None

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
        """The log of the node; it goes with the fleet."""
        return self._started_server().socket_path.with_name("node.log")

    def start(self) -> None:
        """Start Redis and the node together and wait until Redis answers; the node takes longer.

        Raises:
            LocalStartFailed: something is missing, or ended at once; the message says what to do.
        """
        if self._folder is not None:
            raise RuntimeError("LocalFleet started twice. This is a bug.")
        if os.name == "nt":
            raise LocalStartFailed(
                "embedq runs no node on Windows. Use WSL 2, or point EMBEDQ_BROKER_URL and "
                "EMBEDQ_RESULTS_URL at a Redis whose nodes run on Linux."
            )
        command = self._node_command or _default_node()
        try:
            self._folder = RunFolder.create()
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
        for name, process in (("Redis", self._redis), ("node", self._node)):
            code = process.exit_code() if process else None
            if process and code is not None:
                raise LocalStartFailed(
                    f"The private {name} of this run ended with exit code {code}. Mend what its "
                    "log names and run the same command again; it resumes. The last lines:\n"
                    f"{process.last_lines()}"
                )

    def close(self) -> None:
        """End the node, then Redis, and remove their folder; a second call does nothing."""
        for process in (self._node, self._redis):
            if process is not None:
                process.end()
        self._node = self._redis = self._server = None
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
        self._redis = Tethered(server.command, folder / "redis.log", grace_s=GRACE_S)
        environment = {
            **os.environ,
            **self._environment,
            "EMBEDQ_BROKER_URL": server.broker_url,
            "EMBEDQ_RESULTS_URL": server.results_url,
            # Two local runs of one user both call their node "local".
            "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "node"),
            # What Celery's processes leave behind when they are ended goes with our folder.
            "TMPDIR": os.fspath(folder),
        }
        self._node = Tethered(command, self.log_path, grace_s=GRACE_S, environment=environment)

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


def _default_node() -> tuple[str, ...]:
    """Return the command of a node on the CPU, once all that it imports is known to be there."""
    missing = [name for name in NODE_REQUIREMENTS if importlib.util.find_spec(name) is None]
    if missing:
        raise LocalStartFailed(
            f"A node on this machine needs {', '.join(missing)}, which this Python does not have. "
            "Install it: pip install 'embedq[cpu]'."
        )
    # -P: a celery.py in the current folder must not become part of the node.
    node = ("embedq_worker", "start", "--name", "local")
    return (sys.executable, "-P", "-m", *node)
