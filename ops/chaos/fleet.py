"""Start, kill and restart the processes of a chaos run: two Redis servers and the workers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ops.chaos.servers import RedisServer

from embedq_worker.main_process.status import StatusFile

ROOT: Final = Path(__file__).resolve().parents[2]
#: Shorter timeouts than the defaults, so that a run contains many recoveries.
SHORTENED: Final = {
    "EMBEDQ_VISIBILITY_TIMEOUT_S": "5",
    "EMBEDQ_LEASE_RENEWAL_S": "1",
    "EMBEDQ_HEARTBEAT_S": "1",
}


def environment(**variables: str) -> dict[str, str]:
    """Return an environment with only these settings and with both packages on PYTHONPATH."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EMBEDQ_")}
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT / "producer"), str(ROOT / "worker")])
    return {**clean, **variables}


class Schedule:
    """Actions that are due later, such as the restart of a killed server."""

    def __init__(self) -> None:
        self._due: list[tuple[float, Callable[[], object]]] = []

    def __len__(self) -> int:
        return len(self._due)

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Schedule an action in so many seconds."""
        self._due.append((time.monotonic() + seconds, action))

    def poll(self) -> None:
        """Run the actions that are due."""
        now = time.monotonic()
        due = [action for at, action in self._due if at <= now]
        self._due = [(at, action) for at, action in self._due if at > now]
        for action in due:
            action()


class Worker:
    """A worker started by Celery's command and restarted whenever it exits."""

    def __init__(self, folder: Path, name: str, settings: dict[str, str]) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._runtime_dir = folder / f"{name}-run"
        self._environment = environment(
            **settings, EMBEDQ_NAME=name, EMBEDQ_RUNTIME_DIR=str(self._runtime_dir)
        )
        #: Exit code -> count of exits that no injected fault explains.
        self.unexpected_exits: Counter[int] = Counter()
        self._killed = False
        self._start()

    def _start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "celery",
            "--app",
            "embedq_worker.main_process.app",
            "worker",
        ]
        command += ["--hostname", f"{self.name}@chaos", "--without-gossip", "--without-mingle"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--loglevel", "info"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._killed = False

    def poll(self) -> None:
        """Restart the worker if it has exited."""
        if self._process.poll() is None:
            return
        if not self._killed:
            self.unexpected_exits[self._process.returncode] += 1
        with suppress(ProcessLookupError):  # processes that outlived the main process
            os.killpg(self._process.pid, signal.SIGKILL)
        self._start()

    def pool_pid(self) -> int:
        """Return the process id of the running pool process, or 0."""
        state = StatusFile(self._runtime_dir, self.name).read()
        if state is None or not state.pool_pid:
            return 0
        with suppress(OSError):
            fields = Path(f"/proc/{state.pool_pid}/stat").read_text().rpartition(")")[2].split()
            return state.pool_pid if int(fields[1]) == self._process.pid else 0
        return 0

    def is_serving(self) -> bool:
        """Return whether the worker has a pool process."""
        return self._process.poll() is None and self.pool_pid() > 0

    def signal(self, number: signal.Signals, *, whole: bool = False) -> None:
        """Signal the main process, or the whole process group."""
        self._killed = self._killed or number in (signal.SIGKILL, signal.SIGTERM)
        with suppress(ProcessLookupError):
            if whole:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def stop(self) -> None:
        """Kill all processes of the worker."""
        self.signal(signal.SIGKILL, whole=True)
        self._process.wait()


class Fleet:
    """Two Redis servers and the workers."""

    def __init__(self, folder: Path, n_workers: int, engine: dict[str, str]) -> None:
        self.broker = RedisServer(folder, "broker")
        self.results = RedisServer(folder, "results")
        self.schedule = Schedule()
        self.urls = {
            "EMBEDQ_BROKER_URL": self.broker.kombu_url,
            "EMBEDQ_RESULTS_URL": self.results.url,
        }
        settings = {**self.urls, **SHORTENED, **engine, "EMBEDQ_ENGINE_TIMEOUT_S": "3"}
        self.workers = [Worker(folder, f"worker{i}", settings) for i in range(n_workers)]

    @property
    def servers(self) -> tuple[RedisServer, RedisServer]:
        """The broker and the results Redis."""
        return self.broker, self.results

    def serving(self, rng: random.Random) -> Worker | None:
        """Choose a worker that has a pool process."""
        able = [worker for worker in self.workers if worker.is_serving()]
        return rng.choice(able) if able else None

    def poll(self) -> None:
        """Restart workers that have exited, and run due actions."""
        self.schedule.poll()
        for worker in self.workers:
            worker.poll()

    def stop(self) -> None:
        """Kill all processes."""
        for worker in self.workers:
            worker.stop()
        for server in self.servers:
            server.kill()
