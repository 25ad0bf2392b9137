"""When an NPU is trusted and tried again, and what a worker consumes: the table, row by row."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import ModelInfo, WorkerState, WorkerStatus
from embedq_worker.errors import FailureReason
from embedq_worker.main_process.device_health import (
    DeviceHealth,
    ProbeBackoff,
    may_answer,
    queues_for,
)

NOTHING: tuple[Queue, ...] = ()
CPU_FIRST = (Queue.CPU, Queue.NPU)
NPU_ONLY = (Queue.NPU, Queue.NPU_STRICT)


def worker(state: WorkerState, home: str, device: str) -> WorkerStatus:
    """Return the state of a worker."""
    return WorkerStatus("npu0", state, 0.0, 1, assigned_device=home, device=device)


@pytest.mark.parametrize(
    ("state", "home", "device", "queues"),
    [
        (WorkerState.STARTING, "npu", "", NOTHING),
        (WorkerState.STARTING, "cpu", "", NOTHING),
        (WorkerState.PROBING, "npu", "", NOTHING),
        (WorkerState.DEGRADED, "npu", "", NOTHING),
        (WorkerState.FAILED, "npu", "cpu", NOTHING),
        (WorkerState.HEALTHY, "npu", "npu", NPU_ONLY),
        (WorkerState.HEALTHY, "npu", "stub", NPU_ONLY),
        (WorkerState.DEGRADED, "npu", "npu", NOTHING),
        (WorkerState.DEGRADED, "npu", "cpu", CPU_FIRST),
        (WorkerState.PROBING, "npu", "cpu", CPU_FIRST),
        (WorkerState.HEALTHY, "cpu", "cpu", CPU_FIRST),
        (WorkerState.HEALTHY, "stub", "stub", CPU_FIRST),
        *[
            (state, "cpu", "cpu", NOTHING)
            for state in WorkerState
            if state is not WorkerState.HEALTHY
        ],
    ],
)
def test_queues_follow_from_state_and_device(
    state: WorkerState, home: str, device: str, queues: tuple[Queue, ...]
) -> None:
    """A row of the table."""
    assert queues_for(worker(state, home, device)) == queues


def test_worker_with_a_quantized_copy_reads_the_queue_of_int8() -> None:
    """A worker of the CPU that announces a copy, and no worker of an NPU."""
    model_info = ModelInfo("m", "ab" * 32, 8, 16, quantized="copy")
    on_cpu = replace(worker(WorkerState.HEALTHY, "cpu", "cpu"), model_info=model_info)
    on_npu = replace(worker(WorkerState.HEALTHY, "npu", "npu"), model_info=model_info)

    assert queues_for(on_cpu) == (Queue.CPU, Queue.CPU_INT8, Queue.NPU)
    assert queues_for(on_cpu, helps=False) == (Queue.CPU, Queue.CPU_INT8)
    assert queues_for(on_npu) == NPU_ONLY


def test_worker_without_a_state_consumes_nothing() -> None:
    """Its child has not spoken yet."""
    assert queues_for(WorkerStatus("npu0", WorkerState.STARTING, 1.0)) == NOTHING


def test_worker_may_be_kept_to_its_own_queue() -> None:
    """EMBEDQ_CPU_SERVES_NPU_QUEUE=0 keeps a worker of the CPU to embed.cpu."""
    assert queues_for(worker(WorkerState.HEALTHY, "cpu", "cpu"), helps=False) == (Queue.CPU,)


def test_no_cpu_ever_gets_a_strict_batch() -> None:
    """Whatever the state, a worker that computes on a CPU does not consume the strict queue."""
    for state, home, helps in product(WorkerState, ("npu", "cpu", "stub", ""), (True, False)):
        assert Queue.NPU_STRICT not in queues_for(worker(state, home, "cpu"), helps=helps)
    assert not may_answer("embed.npu.strict", Device.CPU)
    assert may_answer("embed.npu.strict", Device.NPU)
    assert may_answer("embed.npu", Device.CPU)


def test_paused_fleet_consumes_nothing() -> None:
    """Whatever its state."""
    for state, home, device in product(
        WorkerState, ("npu", "cpu", "stub"), ("npu", "cpu", "stub", "")
    ):
        assert queues_for(worker(state, home, device), paused=True) == NOTHING


RULES = ProbeBackoff(initial_delay_s=30, max_delay_s=600, reset_after_s=600)


def healthy(since: float = 0.0) -> DeviceHealth:
    """Return the health of an NPU that has proven itself."""
    return DeviceHealth().on_verified(since)


def test_degraded_npu_says_why_and_since_when() -> None:
    """Code, sentence and time are those of the fault."""
    health = healthy().degraded(FailureReason.DEVICE_LOST, "It is gone.", 100.0, RULES)

    assert (health.state, health.code, health.reason) == (
        WorkerState.DEGRADED,
        "device_lost",
        "It is gone.",
    )
    assert (health.state_since, health.failure_count, health.next_probe_at) == (100.0, 1, 130.0)
    assert health.will_retry


def test_first_reason_stays() -> None:
    """What an NPU does after it was given up is no news; an operator's word is."""
    lost = healthy().degraded(FailureReason.DEVICE_LOST, "It is gone.", 100.0, RULES)

    assert lost.degraded(FailureReason.SLOW, "It is slow.", 101.0, RULES) == lost
    held = lost.degraded(FailureReason.OPERATOR, "A new driver.", 102.0, RULES)
    assert (held.reason, held.state_since, held.next_probe_at) == ("A new driver.", 102.0, math.inf)


def test_probes_rest_longer_and_longer() -> None:
    """30 s, then twice as long after every failure, and never over ten minutes."""
    health = healthy().degraded(FailureReason.NOT_FINITE, "", 0.0, RULES)

    pauses = []
    for _ in range(7):
        pauses.append(health.next_probe_at)
        assert not health.probe_due(health.next_probe_at - 0.1)
        assert health.probe_due(health.next_probe_at)
        health = health.probing().probe_failed("selftest_failed", "Still wrong.", 0.0, RULES)

    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    assert (health.reason, health.state_since) == ("Still wrong.", 0.0)


def test_flapping_npu_is_damped() -> None:
    """One that fails soon after it came back rests as if it had never come; settled, it is new."""
    back = (
        healthy()
        .degraded(FailureReason.SLOW, "", 0.0, RULES)
        .probing()
        .on_probe_passed()
        .on_verified(40.0)
    )

    soon = back.degraded(FailureReason.SLOW, "", 40.0 + 599.0, RULES)
    later = back.degraded(FailureReason.SLOW, "", 40.0 + 600.0, RULES)

    assert (soon.failure_count, soon.next_probe_at - 639.0) == (2, 60.0)
    assert (later.failure_count, later.next_probe_at - 640.0) == (1, 30.0)


@pytest.mark.parametrize(
    "code", [FailureReason.NO_COMPILER, FailureReason.COMPILE_REFUSED, "no_device"]
)
def test_structural_reasons_are_not_probed(code: str) -> None:
    """Trying again changes nothing, so strict jobs need not wait either."""
    health = DeviceHealth().degraded(code, "", 0.0, RULES)

    assert health.next_probe_at == math.inf
    assert not health.will_retry
    assert not health.probe_due(1e12)


def test_operator_has_it_probed_at_once() -> None:
    """Also where no probe was planned; a healthy one is left alone."""
    held = healthy().degraded(FailureReason.OPERATOR, "", 5.0, RULES)

    assert held.probe_now(7.0).probe_due(7.0)
    assert healthy().probe_now(7.0) == healthy()


def test_clock_set_back_does_not_delay_a_probe() -> None:
    """A clock before the fault itself is no reason to wait for it to come round again."""
    health = healthy(5e9).degraded(FailureReason.SLOW, "", 5e9, RULES)

    assert health.probe_due(1e9)


def test_clock_set_back_does_not_take_the_pause_from_probes() -> None:
    """One that fails rests as long as at any other time."""
    health = healthy(5e9).degraded(FailureReason.SLOW, "", 5e9, RULES)

    failed = health.probing().probe_failed("selftest_failed", "Still wrong.", 1e9, RULES)

    assert not failed.probe_due(1e9 + 59)
    assert failed.probe_due(1e9 + 60)
