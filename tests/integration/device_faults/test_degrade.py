"""A worker with a faulty NPU degrades, reroutes its batch, and returns after a passed self-test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support.redis import DEADLINE_S, RedisProcess, environment, wait_for
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.protocol.worker import WorkerStatus
from embedq.testing import stub_vectors
from embedq_worker import exit_codes
from embedq_worker.engines.stub import FaultScript

#: Shorter times than the defaults.
QUICK = {
    "EMBEDQ_PROBE_INITIAL_DELAY_S": "0.3",
    "EMBEDQ_PROBE_MAX_DELAY_S": "0.3",
    "EMBEDQ_ENGINE_TIMEOUT_S": "2",
    "EMBEDQ_INIT_TIMEOUT_S": "20",
    "EMBEDQ_SHADOW_CHECK_EVERY": "1",
    "EMBEDQ_STUB_DEVICE": "npu",
}
TEXTS = [f"text {number}" for number in range(64)]


class Npu(WorkerProcess):
    """A worker with a stub NPU and a fault script."""

    def __init__(self, redis: RedisProcess, folder: Path, name: str, **settings: str) -> None:
        self.faults = FaultScript(folder / f"{name}.faults")
        self.faults.replace()
        script = {"EMBEDQ_STUB_FAULTS": os.fspath(folder / f"{name}.faults")}
        super().__init__(redis, folder, name, **{**QUICK, **script, **settings})

    def wait_state(self, *states: str, device: str | None = None) -> WorkerStatus:
        """Wait for a heartbeat with one of these states and, if given, this device."""

        def matching() -> WorkerStatus | None:
            found = self.heartbeat()
            if found is None or found.state not in states:
                return None
            return found if device in (None, found.device) else None

        return wait_for(matching, f"worker {self.name} to be {' or '.join(states)}")


@pytest.fixture
def npu(redis: RedisProcess, short_dir: Path) -> Iterator[Npu]:
    worker = Npu(redis, short_dir, "npu0")
    try:
        worker.wait_healthy()
        yield worker
    finally:
        worker.stop()


def embed(redis: RedisProcess, texts: list[str] = TEXTS) -> list[bool]:
    """Embed texts, check every vector, and return for each text whether it was rerouted."""
    with Client(settings=redis.settings()) as client:
        found = list(client.submit(texts).results(timeout_s=DEADLINE_S))
    np.testing.assert_array_equal([item.vector for item in found], stub_vectors(texts))
    return [item.outcome.rerouted for item in found]


@pytest.mark.redis
@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("raise", "infer_failed"),
        ("device_lost", "device_lost"),
        ("device_unknown", "device_unknown"),
        ("out_of_memory", "out_of_memory"),
        ("nan", "not_finite"),
        ("wrong", "shadow_mismatch"),
        ("hang", "deadline"),
    ],
)
def test_worker_reroutes_after_a_fault_and_recovers(
    fault: str, code: str, npu: Npu, redis: RedisProcess
) -> None:
    npu.faults.replace(f"infer={fault}")

    rerouted = embed(redis)

    degraded = npu.wait_state("degraded", "probing", device="cpu")
    assert any(rerouted)
    assert npu.lines("degraded worker=npu0", f"code={code} ")
    assert degraded.assigned_device == "npu"
    assert degraded.reason
    npu.faults.replace()
    assert npu.wait_state("healthy").device == "stub"
    assert not any(embed(redis))


@pytest.mark.redis
@pytest.mark.parametrize(
    ("fault", "code"),
    [("raise", "compile_refused"), ("slow seconds=30", "init_timeout"), ("exit", "crash_loop")],
)
def test_worker_serves_on_the_cpu_if_its_npu_does_not_open(
    fault: str, code: str, redis: RedisProcess, short_dir: Path
) -> None:
    worker = Npu(redis, short_dir, "npu0", EMBEDQ_CRASH_LOOP_LIMIT="2", EMBEDQ_INIT_TIMEOUT_S="4")
    worker.faults.replace(f"init={fault}")
    try:
        degraded = worker.wait_state("degraded", "probing")

        assert degraded.code == code
        assert degraded.will_retry == (code != "compile_refused")
        embed(redis)
    finally:
        worker.stop()


@pytest.mark.redis
def test_strict_worker_exits_if_its_npu_hangs_at_the_start(
    redis: RedisProcess, short_dir: Path
) -> None:
    worker = Npu(redis, short_dir, "npu0", EMBEDQ_STRICT="1", EMBEDQ_INIT_TIMEOUT_S="2")
    worker.faults.replace("init=hang")
    try:
        assert worker.process.wait(DEADLINE_S) == exit_codes.NPU_UNVERIFIED
    finally:
        worker.stop()


def operate(redis: RedisProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
    return subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments],
        env=environment(**urls),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.redis
def test_operator_degrades_and_recovers_a_worker(
    npu: Npu, redis: RedisProcess, short_dir: Path
) -> None:
    """The command survives a restart of the worker; a misspelled worker name is refused."""
    misspelled = operate(redis, "degrade", "npu1")
    done = operate(redis, "degrade", "npu0", "--reason", "a new driver")

    degraded = npu.wait_state("degraded")
    assert (degraded.code, degraded.reason) == ("operator", "a new driver")
    assert done.returncode == 0
    assert misspelled.returncode == 2
    assert "Did you mean npu0?" in misspelled.stderr

    npu.stop()
    restarted = Npu(redis, short_dir, "npu0")
    try:
        assert restarted.wait_state("degraded").reason == "a new driver"
        embed(redis)
        operate(redis, "recover", "npu0")
        assert restarted.wait_state("healthy").device == "stub"
    finally:
        restarted.stop()


@pytest.mark.redis
def test_degraded_worker_does_not_open_its_npu_after_a_restart(
    npu: Npu, redis: RedisProcess, short_dir: Path
) -> None:
    operate(redis, "degrade", "npu0", "--reason", "a new driver")
    npu.wait_state("degraded", device="cpu")
    npu.stop()

    restarted = Npu(redis, short_dir, "npu0")
    restarted.faults.replace("init=hang")
    try:
        assert restarted.wait_state("degraded", device="cpu").code == "operator"
        assert not (short_dir / "npu0.faults.struck").exists()
    finally:
        restarted.stop()


@pytest.mark.redis
def test_paused_workers_consume_nothing_until_resumed(npu: Npu, redis: RedisProcess) -> None:
    """`embedq status` shows the reason of the pause."""
    before = len(npu.lines("Canceling queue embed.npu"))
    operate(redis, "pause", "--reason", "stocktaking")
    wait_for(
        lambda: npu.lines("Canceling queue embed.npu")[before + 1 :], "both queues to be cancelled"
    )

    with Client(settings=redis.settings()) as client:
        job = client.submit(TEXTS)
        urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
        shown = subprocess.run(
            [sys.executable, "-c", "from embedq.cli.main import main; main()", "status", "--json"],
            env=environment(**urls),
            capture_output=True,
            timeout=DEADLINE_S,
        )
        status = json.loads(shown.stdout)
        assert status["paused"]["reason"] == "stocktaking"
        assert not npu.lines("batch_done")

        operate(redis, "resume")
        found = [item.vector for item in job.results(timeout_s=DEADLINE_S)]
        np.testing.assert_array_equal(found, stub_vectors(TEXTS))
