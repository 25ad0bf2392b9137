"""A worker whose NPU cannot be trusted says so, hands its work on, and comes back once proven."""

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

#: Shorter than in production, by public settings, so that a test need not wait for half a minute.
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
    """A worker with a stub that plays an NPU, whose faults can be switched."""

    def __init__(self, redis: RedisProcess, folder: Path, name: str, **settings: str) -> None:
        self.faults = FaultScript(folder / f"{name}.faults")
        self.faults.replace()
        script = {"EMBEDQ_STUB_FAULTS": os.fspath(folder / f"{name}.faults")}
        super().__init__(redis, folder, name, **{**QUICK, **script, **settings})

    def wait_state(self, *states: str, device: str | None = None) -> WorkerStatus:
        """Wait until the worker says that it is in one of these states, and computes there."""

        def look() -> WorkerStatus | None:
            found = self.heartbeat()
            if found is None or found.state not in states:
                return None
            return found if device in (None, found.device) else None

        return wait_for(look, f"worker {self.name} to be {' or '.join(states)}")


@pytest.fixture
def npu(redis: RedisProcess, short_dir: Path) -> Iterator[Npu]:
    """A healthy worker that plays an NPU, alone in its fleet."""
    worker = Npu(redis, short_dir, "npu0")
    try:
        worker.wait_healthy()
        yield worker
    finally:
        worker.stop()


def embed(redis: RedisProcess, texts: list[str] = TEXTS) -> list[bool]:
    """Embed texts, check every vector, and return for each text whether it was re-routed."""
    with Client(settings=redis.settings()) as client:
        found = list(client.submit(texts).results(timeout_s=DEADLINE_S))
    np.testing.assert_array_equal([one.vector for one in found], stub_vectors(texts))
    return [one.outcome.rerouted for one in found]


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
def test_faulty_npu_hands_its_batch_on_and_comes_back(
    fault: str, code: str, npu: Npu, redis: RedisProcess
) -> None:
    """Each text has its vector; the worker serves on its CPU, then on its NPU again."""
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
def test_npu_that_does_not_open_is_left_alone(
    fault: str, code: str, redis: RedisProcess, short_dir: Path
) -> None:
    """The worker serves on its CPU and says why; only what may pass is tried again."""
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
def test_strict_worker_ends_when_its_npu_hangs_at_the_start(
    redis: RedisProcess, short_dir: Path
) -> None:
    """It is not proven, whatever keeps it from that: the code says so."""
    worker = Npu(redis, short_dir, "npu0", EMBEDQ_STRICT="1", EMBEDQ_INIT_TIMEOUT_S="2")
    worker.faults.replace("init=hang")
    try:
        assert worker.process.wait(DEADLINE_S) == exit_codes.NPU_UNPROVEN
    finally:
        worker.stop()


def operate(redis: RedisProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of `embedq-worker` as an operator would."""
    urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
    return subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments],
        env=environment(**urls),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@pytest.mark.redis
def test_operator_takes_an_npu_out_and_back(npu: Npu, redis: RedisProcess, short_dir: Path) -> None:
    """The order lasts over a restart of the worker until it is undone; a typo is told."""
    typo = operate(redis, "degrade", "npu1")
    done = operate(redis, "degrade", "npu0", "--reason", "a new driver")

    degraded = npu.wait_state("degraded")
    assert (degraded.code, degraded.reason) == ("operator", "a new driver")
    assert done.returncode == 0
    assert typo.returncode == 2
    assert "Did you mean npu0?" in typo.stderr

    npu.stop()
    again = Npu(redis, short_dir, "npu0")
    try:
        assert again.wait_state("degraded").reason == "a new driver"
        embed(redis)
        operate(redis, "recover", "npu0")
        assert again.wait_state("healthy").device == "stub"
    finally:
        again.stop()


@pytest.mark.redis
def test_held_worker_leaves_its_npu_alone_at_a_start(
    npu: Npu, redis: RedisProcess, short_dir: Path
) -> None:
    """An NPU that hangs when it is opened is why it was taken out: the worker serves on its CPU."""
    operate(redis, "degrade", "npu0", "--reason", "a new driver")
    npu.wait_state("degraded", device="cpu")
    npu.stop()

    again = Npu(redis, short_dir, "npu0")
    again.faults.replace("init=hang")
    try:
        assert again.wait_state("degraded", device="cpu").code == "operator"
        assert not (short_dir / "npu0.faults.struck").exists()
    finally:
        again.stop()


@pytest.mark.redis
def test_paused_fleet_takes_nothing_until_it_is_resumed(npu: Npu, redis: RedisProcess) -> None:
    """Batches wait in their queue; `embedq status` says who paused and why."""
    before = len(npu.lines("Canceling queue embed.npu"))
    operate(redis, "pause", "--reason", "stocktaking")
    wait_for(lambda: npu.lines("Canceling queue embed.npu")[before + 1 :], "both queues to be left")

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
        found = [one.vector for one in job.results(timeout_s=DEADLINE_S)]
        np.testing.assert_array_equal(found, stub_vectors(TEXTS))
