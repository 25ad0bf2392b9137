"""What a worker does about its child and its NPU, with a clock and probes of our own."""

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

ON_NPU = Placement(Device.NPU, Device.NPU, "There it is.")
NPU_QUEUES = (Queue.NPU, Queue.NPU_STRICT)
CPU_QUEUES = (Queue.CPU, Queue.NPU)


class ScriptedProbe(DeviceProbe):
    """A probe that ends when the test says so."""

    result: ProbeResult | None = None

    def __init__(self) -> None:
        """Start nothing."""
        self.stopped = False

    def poll(self, now_s: float) -> ProbeResult | None:
        """Return what the test found."""
        return self.result

    def stop(self) -> None:
        """Take note."""
        self.stopped = True


class Story:
    """One worker, told second by second."""

    def __init__(self, placement: Placement | None = ON_NPU, **settings: object) -> None:
        values = {"name": "npu0", "device": "npu", "probe_initial_delay_s": 30, **settings}
        self.probe = ScriptedProbe()
        self.guard = WorkerController(WorkerSettings(**values), placement, lambda *_: self.probe)  # type: ignore[arg-type]
        self.now = 1000.0
        self.child = WorkerStatus("npu0", WorkerState.STARTING, self.now, 1, assigned_device="npu")

    def goes_on(self, seconds: float = 1.0, **said: object) -> None:
        """Let the child say something, and the guard look."""
        self.now += seconds
        self.child = replace(self.child, **said)  # type: ignore[arg-type]
        self.guard.update(self.child, self.now, self.now)

    def is_healthy(self) -> None:
        """Let the child serve on its NPU."""
        self.goes_on(state=WorkerState.HEALTHY, device="npu")

    def is_replaced(self, state: WorkerState, device: str) -> None:
        """Let the pool replace the child as the guard wants."""
        pid = self.guard.kill_pid or self.guard.drain_pid
        assert pid == self.child.pool_pid
        self.guard.replaced(pid)
        self.goes_on(
            pool_pid=pid + 1, state=WorkerState.STARTING, state_since=self.now, device="", code=""
        )
        self.goes_on(state=state, device=device, busy_since=0.0)

    def degrades(self) -> None:
        """Let the device be lost, and the child be replaced by one on the CPU."""
        self.goes_on(state=WorkerState.DEGRADED, code="device_lost", reason="It is gone.")
        self.is_replaced(WorkerState.DEGRADED, "cpu")


def test_npu_is_left_tried_again_and_taken_back() -> None:
    """The whole circle: its queues, the CPU's meanwhile, one probe, and its queues again."""
    story = Story()
    story.is_healthy()
    assert story.guard.queues_to_consume() == NPU_QUEUES

    story.goes_on(state=WorkerState.DEGRADED, code="device_lost", reason="It is gone.")
    assert story.guard.queues_to_consume() == ()
    story.is_replaced(WorkerState.DEGRADED, "cpu")
    assert story.guard.queues_to_consume() == CPU_QUEUES
    assert story.guard.placement == Placement(Device.CPU, Device.NPU, "It is gone.")

    story.goes_on(31)
    shown = story.guard.status()
    assert shown is not None
    assert (shown.state, shown.reason, shown.code) == (
        WorkerState.PROBING,
        "It is gone.",
        "device_lost",
    )
    assert story.guard.queues_to_consume() == CPU_QUEUES

    story.probe.result = ProbeResult(True)
    story.goes_on()
    assert story.guard.placement == ON_NPU
    assert story.guard.queues_to_consume() == ()
    story.is_replaced(WorkerState.HEALTHY, "npu")
    assert story.guard.queues_to_consume() == NPU_QUEUES


def test_failed_probe_leaves_the_worker_on_its_cpu() -> None:
    """It says what the probe found, and rests for twice as long."""
    story = Story()
    story.is_healthy()
    story.degrades()

    story.probe.result = ProbeResult(False, "selftest_failed", "It lies.")
    story.goes_on(31)
    story.goes_on()

    shown = story.guard.status()
    assert shown is not None
    assert (shown.state, shown.code, shown.reason) == (
        WorkerState.DEGRADED,
        "selftest_failed",
        "It lies.",
    )
    assert shown.next_probe_at == story.now + 60


def test_hanging_engine_ends_its_child_at_once() -> None:
    """The parent decides when the child cannot: nobody waits for the batch to be let go."""
    story = Story(engine_timeout_s=10)
    story.is_healthy()

    story.goes_on(busy_since=story.now)
    story.goes_on(9)
    assert story.guard.kill_pid == 0
    story.goes_on(2)

    assert story.guard.kill_pid == 1
    assert story.guard.npu_unhealthy


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, exit_codes.ENGINE)])
def test_child_that_never_comes_up_is_given_up(strict: bool, code: int) -> None:
    """A compiler that hangs in the child itself costs the init budget, once; strict workers end."""
    story = Story(init_timeout_s=100, strict=strict)

    story.goes_on(0)
    story.goes_on(99)
    assert story.guard.kill_pid == 0
    story.goes_on(2)

    assert story.guard.exit_code == code
    assert story.guard.kill_pid == (0 if strict else 1)
    assert story.guard.health.code == ("" if strict else FailureReason.INIT_TIMEOUT)


@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_time_of_day_that_jumps_ends_no_start(jump: float) -> None:
    """A laptop that slept, or a clock that was set, is no compiler that hangs."""
    story = Story(init_timeout_s=100)
    story.goes_on()

    story.guard.update(story.child, story.now + jump, story.now + 99)
    assert story.guard.kill_pid == 0

    story.guard.update(story.child, story.now + jump, story.now + 101)
    assert story.guard.kill_pid == story.child.pool_pid


def test_loop_of_deaths_ends_in_a_degraded_worker() -> None:
    """Never in an endless restart."""
    story = Story(crash_loop_limit=3)

    for pid in range(2, 6):
        story.goes_on(pool_pid=pid)

    assert story.guard.health.code == FailureReason.CRASH_LOOP
    assert story.guard.exit_code == 0


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, exit_codes.ENGINE)])
def test_npu_that_does_not_open(strict: bool, code: int) -> None:
    """A strict worker ends; any other goes on with its CPU."""
    story = Story(strict=strict)

    story.goes_on(state=WorkerState.FAILED, code="compile_failed", reason="No.")

    assert story.guard.exit_code == code
    assert story.guard.npu_unhealthy is not strict


def test_npu_that_vanishes_after_it_was_proven_is_tried_again() -> None:
    """A driver that starts anew shows none for a while, as when a child takes up its NPU again."""
    story = Story()
    story.is_healthy()
    story.degrades()
    story.probe.result = ProbeResult(True)
    story.goes_on(31)
    story.goes_on()
    story.is_replaced(WorkerState.STARTING, "")

    story.goes_on(state=WorkerState.FAILED, code="no_device", reason="OpenVINO shows no NPU.")

    assert story.guard.health.next_probe_at == story.now + 60
    assert story.guard.status().will_retry


def test_operator_is_obeyed_until_the_order_is_undone() -> None:
    """No probe meanwhile, and one at once afterwards."""
    story = Story()
    story.is_healthy()

    story.guard.disable_npu("A new driver.", story.now)
    story.is_replaced(WorkerState.DEGRADED, "cpu")
    story.goes_on(100_000)
    held = story.guard.health.state
    story.guard.enable_npu(story.now)
    story.goes_on()

    assert (held, story.guard.health.state) == (WorkerState.DEGRADED, WorkerState.PROBING)


def test_order_before_the_first_word_of_a_child_ends_that_child() -> None:
    """It was sent to the NPU, where it may hang for ever."""
    story = Story()

    story.guard.disable_npu("Hands off.", story.now)
    story.goes_on()
    story.is_replaced(WorkerState.DEGRADED, "cpu")

    assert story.guard.queues_to_consume() == CPU_QUEUES
    assert story.guard.health.code == FailureReason.OPERATOR


def test_order_holds_a_child_that_finds_its_npu_by_itself() -> None:
    """As after a probe of a worker that began without its NPU: where it is, it says late."""
    story = Story(None)
    story.goes_on(assigned_device="")

    story.guard.disable_npu("Hands off.", story.now)
    story.goes_on(assigned_device="npu")
    story.is_replaced(WorkerState.DEGRADED, "cpu")

    assert story.guard.queues_to_consume() == CPU_QUEUES
    assert story.guard.health.code == FailureReason.OPERATOR


def test_held_worker_without_an_npu_takes_nothing() -> None:
    """That is how an operator drains a worker on the CPU."""
    story = Story(device="cpu")
    story.guard.placement = Placement(Device.CPU, Device.CPU, "EMBEDQ_DEVICE=cpu")
    story.goes_on(state=WorkerState.HEALTHY, assigned_device="cpu", device="cpu")
    assert story.guard.queues_to_consume() == CPU_QUEUES

    story.guard.disable_npu("Going home.", story.now)
    assert story.guard.queues_to_consume() == ()
    assert story.guard.drain_pid == 0

    story.guard.enable_npu(story.now)
    assert story.guard.queues_to_consume() == CPU_QUEUES


def test_order_during_a_probe_ends_the_probe() -> None:
    """It holds the lock of a device that the operator may want to touch."""
    story = Story()
    story.is_healthy()
    story.degrades()
    story.goes_on(31)

    story.guard.disable_npu("Hands off.", story.now)

    assert story.probe.stopped


def test_worker_whose_state_file_is_cleared_away_goes_on() -> None:
    """What its child said last holds until it says something else."""
    story = Story()
    story.is_healthy()

    story.guard.update(None, story.now, story.now)

    assert story.guard.queues_to_consume() == NPU_QUEUES
