"""Tests of device health, probe delays and the queues that a worker consumes."""

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


def worker(state: WorkerState, assigned: str, device: str) -> WorkerStatus:
    return WorkerStatus("npu0", state, 0.0, 1, assigned_device=assigned, device=device)


@pytest.mark.parametrize(
    ("state", "assigned", "device", "queues"),
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
def test_queues_follow_from_state_and_devices(
    state: WorkerState, assigned: str, device: str, queues: tuple[Queue, ...]
) -> None:
    assert queues_for(worker(state, assigned, device)) == queues


def test_cpu_worker_with_a_quantized_model_consumes_the_int8_queue() -> None:
    model_info = ModelInfo("m", "ab" * 32, 8, 16, quantized="ab" * 8)
    on_cpu = replace(worker(WorkerState.HEALTHY, "cpu", "cpu"), model_info=model_info)
    on_npu = replace(worker(WorkerState.HEALTHY, "npu", "npu"), model_info=model_info)

    assert queues_for(on_cpu) == (Queue.CPU, Queue.CPU_INT8, Queue.NPU)
    assert queues_for(on_cpu, helps=False) == (Queue.CPU, Queue.CPU_INT8)
    assert queues_for(on_npu) == NPU_ONLY


def test_worker_without_devices_consumes_nothing() -> None:
    assert queues_for(WorkerStatus("npu0", WorkerState.STARTING, 1.0)) == NOTHING


def test_cpu_worker_may_be_limited_to_the_cpu_queue() -> None:
    assert queues_for(worker(WorkerState.HEALTHY, "cpu", "cpu"), helps=False) == (Queue.CPU,)


def test_worker_on_a_cpu_never_consumes_the_strict_queue() -> None:
    for state, assigned, helps in product(WorkerState, ("npu", "cpu", "stub", ""), (True, False)):
        assert Queue.NPU_STRICT not in queues_for(worker(state, assigned, "cpu"), helps=helps)
    assert not may_answer("embed.npu.strict", Device.CPU)
    assert may_answer("embed.npu.strict", Device.NPU)
    assert may_answer("embed.npu", Device.CPU)


def test_paused_fleet_consumes_nothing() -> None:
    for state, assigned, device in product(
        WorkerState, ("npu", "cpu", "stub"), ("npu", "cpu", "stub", "")
    ):
        assert queues_for(worker(state, assigned, device), paused=True) == NOTHING


BACKOFF = ProbeBackoff(initial_delay_s=30, max_delay_s=600, reset_after_s=600)


def healthy(since: float = 0.0) -> DeviceHealth:
    return DeviceHealth().on_verified(since)


def test_degraded_npu_has_code_reason_and_time_of_the_fault() -> None:
    health = healthy().degraded(FailureReason.DEVICE_LOST, "It is gone.", 100.0, BACKOFF)

    assert (health.state, health.code, health.reason) == (
        WorkerState.DEGRADED,
        "device_lost",
        "It is gone.",
    )
    assert (health.state_since, health.failure_count, health.next_probe_at) == (100.0, 1, 130.0)
    assert health.will_retry


def test_only_an_operator_replaces_the_reason_of_a_degraded_npu() -> None:
    lost = healthy().degraded(FailureReason.DEVICE_LOST, "It is gone.", 100.0, BACKOFF)

    assert lost.degraded(FailureReason.SLOW, "It is slow.", 101.0, BACKOFF) == lost
    disabled = lost.degraded(FailureReason.OPERATOR, "A new driver.", 102.0, BACKOFF)
    assert (disabled.reason, disabled.state_since, disabled.next_probe_at) == (
        "A new driver.",
        102.0,
        math.inf,
    )


def test_probe_delay_doubles_up_to_its_maximum() -> None:
    health = healthy().degraded(FailureReason.NOT_FINITE, "", 0.0, BACKOFF)

    pauses = []
    for _ in range(7):
        pauses.append(health.next_probe_at)
        assert not health.probe_due(health.next_probe_at - 0.1)
        assert health.probe_due(health.next_probe_at)
        health = health.probing().probe_failed("selftest_failed", "Still wrong.", 0.0, BACKOFF)

    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    assert (health.reason, health.state_since) == ("Still wrong.", 0.0)


def test_npu_that_fails_soon_after_a_recovery_waits_twice_as_long() -> None:
    back = (
        healthy()
        .degraded(FailureReason.SLOW, "", 0.0, BACKOFF)
        .probing()
        .on_probe_passed()
        .on_verified(40.0)
    )

    soon = back.degraded(FailureReason.SLOW, "", 40.0 + 599.0, BACKOFF)
    later = back.degraded(FailureReason.SLOW, "", 40.0 + 600.0, BACKOFF)

    assert (soon.failure_count, soon.next_probe_at - 639.0) == (2, 60.0)
    assert (later.failure_count, later.next_probe_at - 640.0) == (1, 30.0)


@pytest.mark.parametrize(
    "code", [FailureReason.NO_COMPILER, FailureReason.COMPILE_REFUSED, "no_device"]
)
def test_permanent_faults_are_not_probed(code: str) -> None:
    health = DeviceHealth().degraded(code, "", 0.0, BACKOFF)

    assert health.next_probe_at == math.inf
    assert not health.will_retry
    assert not health.probe_due(1e12)


def test_probe_now_makes_a_degraded_npu_due() -> None:
    disabled = healthy().degraded(FailureReason.OPERATOR, "", 5.0, BACKOFF)

    assert disabled.probe_now(7.0).probe_due(7.0)
    assert healthy().probe_now(7.0) == healthy()


def test_clock_set_back_does_not_delay_a_probe() -> None:
    health = healthy(5e9).degraded(FailureReason.SLOW, "", 5e9, BACKOFF)

    assert health.probe_due(1e9)


def test_clock_set_back_does_not_shorten_the_delay_after_a_failed_probe() -> None:
    health = healthy(5e9).degraded(FailureReason.SLOW, "", 5e9, BACKOFF)

    failed = health.probing().probe_failed("selftest_failed", "Still wrong.", 1e9, BACKOFF)

    assert not failed.probe_due(1e9 + 59)
    assert failed.probe_due(1e9 + 60)
