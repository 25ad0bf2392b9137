"""Start the workers of a device-fault run and read their logs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final

from ops.chaos.fleet import environment
from ops.chaos.servers import RedisServer
from redis.exceptions import RedisError

from embedq.store import fleet
from embedq.store.fleet import DesiredState, set_desired_state
from embedq_worker.engines.stub import FaultScript
from embedq_worker.main_process.device_health import LEARN_FROM
from embedq_worker.main_process.status import StatusFile

#: Shorter times than the defaults; the report prints them.
SETTINGS: Final = {
    "EMBEDQ_VISIBILITY_TIMEOUT_S": "5",
    "EMBEDQ_LEASE_RENEWAL_S": "1",
    "EMBEDQ_HEARTBEAT_S": "1",
    "EMBEDQ_PROBE_INITIAL_DELAY_S": "0.2",
    "EMBEDQ_PROBE_MAX_DELAY_S": "0.2",
    "EMBEDQ_ENGINE_TIMEOUT_S": "1.5",
    "EMBEDQ_INIT_TIMEOUT_S": "5",
    "EMBEDQ_CRASH_LOOP_LIMIT": "2",
    "EMBEDQ_CRASH_LOOP_WINDOW_S": "10",
    "EMBEDQ_SLOW_BATCHES": "2",
    "EMBEDQ_SHADOW_CHECK_EVERY": "1",
    # At most ten batches per second and worker, to leave CPU time for workers that restart.
    "EMBEDQ_STUB_DELAY_S": "0.1",
}
#: Seconds in which all workers must be ready.
READY_S: Final = 60.0

_AT: Final = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ")


class LoggedWorker:
    """A worker under its supervisor, with its log."""

    settings: dict[str, str]

    def __init__(self, folder: Path, name: str, urls: dict[str, str]) -> None:
        self.name = name
        self._log_path = folder / f"{name}.log"
        self._state = StatusFile(folder / f"{name}-run", name)
        self._read = 0
        self._lines: list[str] = []
        variables = {**SETTINGS, **urls, **self.settings, "EMBEDQ_NAME": name}
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "embedq_worker", "start"],
                env=environment(**variables, EMBEDQ_RUNTIME_DIR=str(folder / f"{name}-run")),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def lines(self) -> list[str]:
        """Return the lines that the worker has logged."""
        with self._log_path.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        self._lines += whole.decode(errors="replace").splitlines()
        return self._lines

    def count(self, words: str) -> int:
        """Count the lines that contain these words."""
        return sum(words in line for line in self.lines())

    def stop(self) -> None:
        """Stop the worker."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


class CpuWorker(LoggedWorker):
    """A worker on the CPU."""

    def __init__(self, folder: Path, number: int, owner: DeviceFleet) -> None:
        self.settings = {"EMBEDQ_DEVICE": "stub", "EMBEDQ_MODEL": "stub"}
        super().__init__(folder, f"cpu{number}", owner.urls)


class Npu(LoggedWorker):
    """A worker with a stub NPU and without a CPU fallback."""

    def __init__(self, folder: Path, number: int, owner: DeviceFleet) -> None:
        self._owner = owner
        self._script = FaultScript(folder / f"npu{number}.faults")
        self._script.replace()
        self._mark = 0
        self._structural = False
        self.settings = {
            "EMBEDQ_DEVICE": "stub",
            "EMBEDQ_MODEL": "stub",
            "EMBEDQ_STUB_DEVICE": "npu",
            "EMBEDQ_STUB_FAULTS": str(folder / f"npu{number}.faults"),
            "EMBEDQ_CPU_FALLBACK": "0",
        }
        super().__init__(folder, f"npu{number}", owner.urls)

    def inject(self, line: str) -> None:
        """Inject a fault; one of the start also kills the pool process, so that it starts again."""
        self._mark = len(self.lines())
        self._script.replace(line)
        self._structural = line == "init=raise"
        if line.startswith("init="):
            state = self._state.read()
            if state is not None:
                with suppress(ProcessLookupError):
                    os.kill(state.pool_pid, signal.SIGKILL)

    def clear_fault(self) -> None:
        """Remove the fault; where no probe would be made, ask for one as an operator does."""
        self._mark = len(self.lines())
        self._script.replace()
        if self._structural:
            set_desired_state(self._owner.results.client, self.name, DesiredState.HEALTHY, "")

    def has_latency_baseline(self) -> bool:
        """Return whether it has done enough batches to detect a slowdown."""
        return sum("batch_done" in line for line in self._since()) > LEARN_FROM

    def has_degraded(self) -> bool:
        """Return whether it has degraded since the fault."""
        return any(" degraded worker=" in line and "count=" in line for line in self._since())

    def has_recovered(self) -> bool:
        """Return whether it has served on its NPU again since the fault was removed."""
        return any("Started consuming from embed.npu.strict" in line for line in self._since())

    def timings(self) -> Iterator[tuple[str, float]]:
        """Yield the seconds that each reroute and each cancellation of the NPU queue took."""
        seen = degraded = 0.0
        consumes = False
        for line in self.lines():
            found = _AT.match(line)
            if not found:
                continue
            at = datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            if "device_unhealthy" in line:
                seen = at
            elif " degraded worker=" in line and "count=" in line:
                seen, degraded = seen or at, at if consumes else 0.0
            elif "batch_rerouted" in line and seen:
                yield "rerouted", at - seen
            elif line.endswith("Started consuming from embed.npu"):
                consumes = True
            elif line.endswith("Canceling queue embed.npu"):
                if degraded:
                    yield "left", at - degraded
                consumes, degraded = False, 0.0
            elif "probe_passed" in line:
                seen = degraded = 0.0

    def _since(self) -> list[str]:
        return self.lines()[self._mark :]


class DeviceFleet:
    """Two Redis servers and the workers."""

    def __init__(self, folder: Path, kinds: list[type[Npu] | type[CpuWorker]]) -> None:
        self.began = time.monotonic()
        self.broker = RedisServer(folder, "broker")
        self.results = RedisServer(folder, "results")
        self.urls = {
            "EMBEDQ_BROKER_URL": self.broker.kombu_url,
            "EMBEDQ_RESULTS_URL": self.results.url,
        }
        self._restart_at = 0.0
        self.workers = [kind(folder, number, self) for number, kind in enumerate(kinds)]
        self.npus = [worker for worker in self.workers if isinstance(worker, Npu)]

    def wait_ready(self) -> None:
        """Wait until every worker serves."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            with suppress(RedisError):
                alive = fleet.list_live_workers(self.results.client)
                if sum(worker.state == "healthy" for worker in alive) == len(self.workers):
                    return
            time.sleep(0.1)
        sys.exit(f"ops/chaos/device_faults.py: the workers were not ready within {READY_S:.0f} s.")

    def kill_clients(self) -> None:
        """Close every connection of the broker."""
        with suppress(RedisError):
            self.broker.client.client_kill_filter(_type="normal", skipme=True)
            self.broker.client.client_kill_filter(_type="pubsub")

    def restart_broker(self) -> None:
        """Kill the broker; `poll` restarts it."""
        self.broker.kill()
        self._restart_at = time.monotonic() + 0.5

    def poll(self) -> None:
        """Restart the broker if that is due."""
        if self._restart_at and time.monotonic() >= self._restart_at:
            self._restart_at = 0.0
            self.broker.start()

    def stop(self) -> None:
        """Stop all processes."""
        for worker in self.workers:
            worker.stop()
        for server in (self.broker, self.results):
            server.kill()
