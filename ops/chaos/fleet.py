"""The processes of a run: two Redis and some workers, each of which may be killed at any moment."""

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
#: Settings of a run that are shorter than the defaults, so that an hour holds many recoveries.
SHORTENED: Final = {
    "EMBEDQ_VISIBILITY_TIMEOUT_S": "5",
    "EMBEDQ_LEASE_RENEWAL_S": "1",
    "EMBEDQ_HEARTBEAT_S": "1",
}


def environment(**variables: str) -> dict[str, str]:
    """Return an environment without settings but these, in which a child finds the packages."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("EMBEDQ_")}
    clean["PYTHONPATH"] = os.pathsep.join([str(ROOT / "producer"), str(ROOT / "worker")])
    return {**clean, **variables}


class Agenda:
    """What is to be done later, such as starting what was killed."""

    def __init__(self) -> None:
        self._due: list[tuple[float, Callable[[], object]]] = []

    def __len__(self) -> int:
        return len(self._due)

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something in so many seconds."""
        self._due.append((time.monotonic() + seconds, action))

    def tend(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        due = [action for at, action in self._due if at <= now]
        self._due = [(at, action) for at, action in self._due if at > now]
        for action in due:
            action()


class Worker:
    """A worker started as the README says, by Celery's own command, and again whenever it ends."""

    def __init__(self, folder: Path, name: str, settings: dict[str, str]) -> None:
        self.name = name
        self.log_path = folder / f"{name}.log"
        self._runtime_dir = folder / f"{name}-run"
        self._environment = environment(
            **settings, EMBEDQ_NAME=name, EMBEDQ_RUNTIME_DIR=str(self._runtime_dir)
        )
        #: Return codes of ends that no fault of ours explains.
        self.own_ends: Counter[int] = Counter()
        self._ended_by_us = False
        self._start()

    def _start(self) -> None:
        words = [
            sys.executable,
            "-m",
            "celery",
            "--app",
            "embedq_worker.main_process.app",
            "worker",
        ]
        words += ["--hostname", f"{self.name}@chaos", "--without-gossip", "--without-mingle"]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [*words, "--loglevel", "info"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._ended_by_us = False

    def tend(self) -> None:
        """Start the worker again if it ended."""
        if self._process.poll() is None:
            return
        if not self._ended_by_us:
            self.own_ends[self._process.returncode] += 1
        with suppress(ProcessLookupError):  # children that outlived their parent
            os.killpg(self._process.pid, signal.SIGKILL)
        self._start()

    def child_pid(self) -> int:
        """Return the process id of the living child, 0 if there is none to be seen."""
        state = StatusFile(self._runtime_dir, self.name).read()
        if state is None or not state.pid:
            return 0
        with suppress(OSError):
            fields = Path(f"/proc/{state.pid}/stat").read_text().rpartition(")")[2].split()
            return state.pid if int(fields[1]) == self._process.pid else 0
        return 0

    def is_serving(self) -> bool:
        """Tell whether the worker has a child."""
        return self._process.poll() is None and self.child_pid() > 0

    def signal(self, number: signal.Signals, *, whole: bool = False) -> None:
        """Signal the parent, or the whole process group."""
        self._ended_by_us = self._ended_by_us or number in (signal.SIGKILL, signal.SIGTERM)
        with suppress(ProcessLookupError):
            if whole:
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def stop(self) -> None:
        """End the worker and all of its processes."""
        self.signal(signal.SIGKILL, whole=True)
        self._process.wait()


class Fleet:
    """Everything that serves."""

    def __init__(self, folder: Path, n_workers: int, engine: dict[str, str]) -> None:
        self.broker = RedisServer(folder, "broker")
        self.results = RedisServer(folder, "results")
        self.agenda = Agenda()
        self.urls = {
            "EMBEDQ_BROKER_URL": self.broker.kombu_url,
            "EMBEDQ_RESULTS_URL": self.results.url,
        }
        settings = {**self.urls, **SHORTENED, **engine, "EMBEDQ_ENGINE_TIMEOUT_S": "3"}
        self.workers = [Worker(folder, f"worker{i}", settings) for i in range(n_workers)]

    @property
    def servers(self) -> tuple[RedisServer, RedisServer]:
        """Both Redis."""
        return self.broker, self.results

    def serving(self, rng: random.Random) -> Worker | None:
        """Choose a worker that has a child."""
        able = [worker for worker in self.workers if worker.is_serving()]
        return rng.choice(able) if able else None

    def tend(self) -> None:
        """Start again what has ended, and do what is due."""
        self.agenda.tend()
        for worker in self.workers:
            worker.tend()

    def stop(self) -> None:
        """End everything."""
        for worker in self.workers:
            worker.stop()
        for server in self.servers:
            server.kill()
