"""Tests of how the controller reacts to its pool process, its NPU and operator commands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq_worker import exit_codes
from embedq_worker.device.placement import Placement
from embedq_worker.errors import FailureReason
from embedq_worker.main_process.controller import WorkerController
from embedq_worker.main_process.probe import DeviceProbe, ProbeResult
from embedq_worker.settings import WorkerSettings

ON_NPU = Placement(Device.NPU, Device.NPU, "Found accel0.")
NPU_QUEUES = (Queue.NPU, Queue.NPU_STRICT)
CPU_QUEUES = (Queue.CPU, Queue.NPU)


class ScriptedProbe(DeviceProbe):
    """Probe whose result the test sets."""

    result: ProbeResult | None = None

    def __init__(self) -> None:
        self.stopped = False

    def poll(self, now_s: float) -> ProbeResult | None:
        return self.result

    def stop(self) -> None:
        self.stopped = True


class Scenario:
    """One worker whose pool process and clock a test drives."""

    def __init__(self, placement: Placement | None = ON_NPU, **settings: object) -> None:
        values = {"name": "npu0", "device": "npu", "probe_initial_delay_s": 30, **settings}
        self.probe = ScriptedProbe()
        loaded = WorkerSettings(**values)  # type: ignore[arg-type]
        self.controller = WorkerController(loaded, placement, lambda *_: self.probe)
        self.now = 1000.0
        self.pool = WorkerStatus("npu0", WorkerState.STARTING, self.now, 1, assigned_device="npu")

    def advance(self, seconds: float = 1.0, **changes: object) -> None:
        """Advance the clock, change the status of the pool process and update the controller."""
        self.now += seconds
        self.pool = replace(self.pool, **changes)  # type: ignore[arg-type]
        self.controller.update(self.pool, self.now, self.now)

    def become_healthy(self) -> None:
        """Report a healthy pool process on the NPU."""
        self.advance(state=WorkerState.HEALTHY, device="npu")

    def replace_pool(self, state: WorkerState, device: str) -> None:
        """Replace the pool process that the controller is ending."""
        pid = self.controller.kill_pid or self.controller.drain_pid
        assert pid == self.pool.pool_pid
        self.controller.replaced(pid)
        self.advance(
            pool_pid=pid + 1, state=WorkerState.STARTING, state_since=self.now, device="", code=""
        )
        self.advance(state=state, device=device, busy_since=0.0)

    def lose_device(self) -> None:
        """Report a lost device and replace the pool process by one on the CPU."""
        self.advance(state=WorkerState.DEGRADED, code="device_lost", reason="It is gone.")
        self.replace_pool(WorkerState.DEGRADED, "cpu")


def test_lost_npu_is_probed_and_used_again_after_a_passed_probe() -> None:
    scenario = Scenario()
    scenario.become_healthy()
    assert scenario.controller.queues_to_consume() == NPU_QUEUES

    scenario.advance(state=WorkerState.DEGRADED, code="device_lost", reason="It is gone.")
    assert scenario.controller.queues_to_consume() == ()
    scenario.replace_pool(WorkerState.DEGRADED, "cpu")
    assert scenario.controller.queues_to_consume() == CPU_QUEUES
    assert scenario.controller.placement == Placement(Device.CPU, Device.NPU, "It is gone.")

    scenario.advance(31)
    shown = scenario.controller.status()
    assert shown is not None
    assert (shown.state, shown.reason, shown.code) == (
        WorkerState.PROBING,
        "It is gone.",
        "device_lost",
    )
    assert scenario.controller.queues_to_consume() == CPU_QUEUES

    scenario.probe.result = ProbeResult(True)
    scenario.advance()
    assert scenario.controller.placement == ON_NPU
    assert scenario.controller.queues_to_consume() == ()
    scenario.replace_pool(WorkerState.HEALTHY, "npu")
    assert scenario.controller.queues_to_consume() == NPU_QUEUES


def test_failed_probe_doubles_the_delay_on_the_cpu() -> None:
    scenario = Scenario()
    scenario.become_healthy()
    scenario.lose_device()

    scenario.probe.result = ProbeResult(False, "selftest_failed", "Wrong vectors.")
    scenario.advance(31)
    scenario.advance()

    shown = scenario.controller.status()
    assert shown is not None
    assert (shown.state, shown.code, shown.reason) == (
        WorkerState.DEGRADED,
        "selftest_failed",
        "Wrong vectors.",
    )
    assert shown.next_probe_at == scenario.now + 60


def test_engine_past_its_timeout_kills_the_pool_process() -> None:
    scenario = Scenario(engine_timeout_s=10)
    scenario.become_healthy()

    scenario.advance(busy_since=scenario.now)
    scenario.advance(9)
    assert scenario.controller.kill_pid == 0
    scenario.advance(2)

    assert scenario.controller.kill_pid == 1
    assert scenario.controller.npu_unhealthy


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, exit_codes.ENGINE)])
def test_pool_process_past_the_init_timeout_is_killed_or_ends_a_strict_worker(
    strict: bool, code: int
) -> None:
    scenario = Scenario(init_timeout_s=100, strict=strict)

    scenario.advance(0)
    scenario.advance(99)
    assert scenario.controller.kill_pid == 0
    scenario.advance(2)

    assert scenario.controller.exit_code == code
    assert scenario.controller.kill_pid == (0 if strict else 1)
    assert scenario.controller.health.code == ("" if strict else FailureReason.INIT_TIMEOUT)


@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_jump_of_the_wall_clock_does_not_end_a_start(jump: float) -> None:
    scenario = Scenario(init_timeout_s=100)
    scenario.advance()

    scenario.controller.update(scenario.pool, scenario.now + jump, scenario.now + 99)
    assert scenario.controller.kill_pid == 0

    scenario.controller.update(scenario.pool, scenario.now + jump, scenario.now + 101)
    assert scenario.controller.kill_pid == scenario.pool.pool_pid


def test_crash_loop_degrades_the_worker() -> None:
    scenario = Scenario(crash_loop_limit=3)

    for pid in range(2, 6):
        scenario.advance(pool_pid=pid)

    assert scenario.controller.health.code == FailureReason.CRASH_LOOP
    assert scenario.controller.exit_code == 0


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, exit_codes.ENGINE)])
def test_npu_that_does_not_open_degrades_the_worker_or_ends_a_strict_one(
    strict: bool, code: int
) -> None:
    scenario = Scenario(strict=strict)

    scenario.advance(state=WorkerState.FAILED, code="compile_failed", reason="No.")

    assert scenario.controller.exit_code == code
    assert scenario.controller.npu_unhealthy is not strict


def test_npu_missing_after_a_passed_probe_is_probed_again() -> None:
    scenario = Scenario()
    scenario.become_healthy()
    scenario.lose_device()
    scenario.probe.result = ProbeResult(True)
    scenario.advance(31)
    scenario.advance()
    scenario.replace_pool(WorkerState.STARTING, "")

    scenario.advance(state=WorkerState.FAILED, code="no_device", reason="OpenVINO shows no NPU.")

    assert scenario.controller.health.next_probe_at == scenario.now + 60
    assert scenario.controller.status().will_retry


def test_npu_disabled_by_an_operator_is_not_probed_until_enabled() -> None:
    scenario = Scenario()
    scenario.become_healthy()

    scenario.controller.disable_npu("A new driver.", scenario.now)
    scenario.replace_pool(WorkerState.DEGRADED, "cpu")
    scenario.advance(100_000)
    disabled_state = scenario.controller.health.state
    scenario.controller.enable_npu(scenario.now)
    scenario.advance()

    assert (disabled_state, scenario.controller.health.state) == (
        WorkerState.DEGRADED,
        WorkerState.PROBING,
    )


def test_disable_before_the_first_status_replaces_the_pool_process() -> None:
    scenario = Scenario()

    scenario.controller.disable_npu("Maintenance.", scenario.now)
    scenario.advance()
    scenario.replace_pool(WorkerState.DEGRADED, "cpu")

    assert scenario.controller.queues_to_consume() == CPU_QUEUES
    assert scenario.controller.health.code == FailureReason.OPERATOR


def test_disable_applies_to_a_pool_process_that_reports_an_npu_later() -> None:
    scenario = Scenario(None)
    scenario.advance(assigned_device="")

    scenario.controller.disable_npu("Maintenance.", scenario.now)
    scenario.advance(assigned_device="npu")
    scenario.replace_pool(WorkerState.DEGRADED, "cpu")

    assert scenario.controller.queues_to_consume() == CPU_QUEUES
    assert scenario.controller.health.code == FailureReason.OPERATOR


def test_disabled_worker_without_an_npu_consumes_nothing_until_enabled() -> None:
    scenario = Scenario(device="cpu")
    scenario.controller.placement = Placement(Device.CPU, Device.CPU, "EMBEDQ_DEVICE=cpu")
    scenario.advance(state=WorkerState.HEALTHY, assigned_device="cpu", device="cpu")
    assert scenario.controller.queues_to_consume() == CPU_QUEUES

    scenario.controller.disable_npu("Maintenance.", scenario.now)
    assert scenario.controller.queues_to_consume() == ()
    assert scenario.controller.drain_pid == 0

    scenario.controller.enable_npu(scenario.now)
    assert scenario.controller.queues_to_consume() == CPU_QUEUES


def test_disable_stops_a_running_probe() -> None:
    scenario = Scenario()
    scenario.become_healthy()
    scenario.lose_device()
    scenario.advance(31)

    scenario.controller.disable_npu("Maintenance.", scenario.now)

    assert scenario.probe.stopped


def test_missing_status_file_does_not_change_the_queues() -> None:
    scenario = Scenario()
    scenario.become_healthy()

    scenario.controller.update(None, scenario.now, scenario.now)

    assert scenario.controller.queues_to_consume() == NPU_QUEUES
