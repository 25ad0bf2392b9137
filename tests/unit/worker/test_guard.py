"""What a node does about its child and its NPU, with a clock and probes of our own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import State
from embedq_worker import exit_codes
from embedq_worker.device.placement import Placement
from embedq_worker.errors import Reason
from embedq_worker.main_process.controller import Guard
from embedq_worker.main_process.probe import Finding, Probe
from embedq_worker.main_process.status import NodeState
from embedq_worker.settings import WorkerSettings

ON_NPU = Placement(Device.NPU, Device.NPU, "There it is.")
NPU_QUEUES = (Queue.NPU, Queue.NPU_STRICT)
CPU_QUEUES = (Queue.CPU, Queue.NPU)


class ScriptedProbe(Probe):
    """A probe that ends when the test says so."""

    finding: Finding | None = None

    def __init__(self) -> None:
        """Start nothing."""
        self.stopped = False

    def poll(self, now_s: float) -> Finding | None:
        """Return what the test found."""
        return self.finding

    def stop(self) -> None:
        """Take note."""
        self.stopped = True


class Story:
    """One node, told second by second."""

    def __init__(self, placement: Placement | None = ON_NPU, **settings: object) -> None:
        values = {"name": "npu0", "device": "npu", "probe_first_s": 30, **settings}
        self.probe = ScriptedProbe()
        self.guard = Guard(WorkerSettings(**values), placement, lambda *_: self.probe)  # type: ignore[arg-type]
        self.now = 1000.0
        self.child = NodeState(State.STARTING, self.now, 1, home="npu")

    def goes_on(self, seconds: float = 1.0, **said: object) -> None:
        """Let the child say something, and the guard look."""
        self.now += seconds
        self.child = replace(self.child, **said)  # type: ignore[arg-type]
        self.guard.look(self.child, self.now, self.now)

    def is_healthy(self) -> None:
        """Let the child serve on its NPU."""
        self.goes_on(state=State.HEALTHY, device="npu")

    def is_replaced(self, state: State, device: str) -> None:
        """Let the pool replace the child as the guard wants."""
        pid = self.guard.kills or self.guard.replaces
        assert pid == self.child.pid
        self.guard.replaced(pid)
        self.goes_on(pid=pid + 1, state=State.STARTING, since=self.now, device="", code="")
        self.goes_on(state=state, device=device, busy_since=0.0)

    def degrades(self) -> None:
        """Let the device be lost, and the child be replaced by one on the CPU."""
        self.goes_on(state=State.DEGRADED, code="device_lost", reason="It is gone.")
        self.is_replaced(State.DEGRADED, "cpu")


def test_npu_is_left_tried_again_and_taken_back() -> None:
    """The whole circle: its queues, the CPU's meanwhile, one probe, and its queues again."""
    story = Story()
    story.is_healthy()
    assert story.guard.wanted() == NPU_QUEUES

    story.goes_on(state=State.DEGRADED, code="device_lost", reason="It is gone.")
    assert story.guard.wanted() == ()
    story.is_replaced(State.DEGRADED, "cpu")
    assert story.guard.wanted() == CPU_QUEUES
    assert story.guard.placement == Placement(Device.CPU, Device.NPU, "It is gone.")

    story.goes_on(31)
    shown = story.guard.shown()
    assert shown is not None
    assert (shown.state, shown.reason, shown.code) == (State.PROBING, "It is gone.", "device_lost")
    assert story.guard.wanted() == CPU_QUEUES

    story.probe.finding = Finding(True)
    story.goes_on()
    assert story.guard.placement == ON_NPU
    assert story.guard.wanted() == ()
    story.is_replaced(State.HEALTHY, "npu")
    assert story.guard.wanted() == NPU_QUEUES


def test_failed_probe_leaves_the_node_on_its_cpu() -> None:
    """It says what the probe found, and rests for twice as long."""
    story = Story()
    story.is_healthy()
    story.degrades()

    story.probe.finding = Finding(False, "selftest_failed", "It lies.")
    story.goes_on(31)
    story.goes_on()

    shown = story.guard.shown()
    assert shown is not None
    assert (shown.state, shown.code, shown.reason) == (
        State.DEGRADED,
        "selftest_failed",
        "It lies.",
    )
    assert shown.probe_at == story.now + 60


def test_hanging_engine_ends_its_child_at_once() -> None:
    """The parent decides when the child cannot: nobody waits for the batch to be let go."""
    story = Story(engine_deadline_s=10)
    story.is_healthy()

    story.goes_on(busy_since=story.now)
    story.goes_on(9)
    assert story.guard.kills == 0
    story.goes_on(2)

    assert story.guard.kills == 1
    assert story.guard.distrusts_npu


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, exit_codes.ENGINE)])
def test_child_that_never_comes_up_is_given_up(strict: bool, code: int) -> None:
    """A compiler that hangs in the child itself costs the init budget, once; strict nodes end."""
    story = Story(init_budget_s=100, strict=strict)

    story.goes_on(0)
    story.goes_on(99)
    assert story.guard.kills == 0
    story.goes_on(2)

    assert story.guard.ends_with == code
    assert story.guard.kills == (0 if strict else 1)
    assert story.guard.health.code == ("" if strict else Reason.INIT_DEADLINE)


@pytest.mark.parametrize("jump", [86_400, -86_400])
def test_time_of_day_that_jumps_ends_no_start(jump: float) -> None:
    """A laptop that slept, or a clock that was set, is no compiler that hangs."""
    story = Story(init_budget_s=100)
    story.goes_on()

    story.guard.look(story.child, story.now + jump, story.now + 99)
    assert story.guard.kills == 0

    story.guard.look(story.child, story.now + jump, story.now + 101)
    assert story.guard.kills == story.child.pid


def test_loop_of_deaths_ends_in_a_degraded_node() -> None:
    """Never in an endless restart."""
    story = Story(crash_loop_deaths=3)

    for pid in range(2, 6):
        story.goes_on(pid=pid)

    assert story.guard.health.code == Reason.CRASH_LOOP
    assert story.guard.ends_with == 0


@pytest.mark.parametrize(("strict", "code"), [(False, 0), (True, exit_codes.ENGINE)])
def test_npu_that_does_not_open(strict: bool, code: int) -> None:
    """A strict node ends; any other goes on with its CPU."""
    story = Story(strict=strict)

    story.goes_on(state=State.FAILED, code="compile_failed", reason="No.")

    assert story.guard.ends_with == code
    assert story.guard.distrusts_npu is not strict


def test_npu_that_vanishes_after_it_was_proven_is_tried_again() -> None:
    """A driver that starts anew shows none for a while, as when a child takes up its NPU again."""
    story = Story()
    story.is_healthy()
    story.degrades()
    story.probe.finding = Finding(True)
    story.goes_on(31)
    story.goes_on()
    story.is_replaced(State.STARTING, "")

    story.goes_on(state=State.FAILED, code="no_device", reason="OpenVINO shows no NPU.")

    assert story.guard.health.probe_at == story.now + 60
    assert story.guard.shown().may_return


def test_operator_is_obeyed_until_the_order_is_undone() -> None:
    """No probe meanwhile, and one at once afterwards."""
    story = Story()
    story.is_healthy()

    story.guard.hold("A new driver.", story.now)
    story.is_replaced(State.DEGRADED, "cpu")
    story.goes_on(100_000)
    held = story.guard.health.state
    story.guard.release(story.now)
    story.goes_on()

    assert (held, story.guard.health.state) == (State.DEGRADED, State.PROBING)


def test_order_before_the_first_word_of_a_child_ends_that_child() -> None:
    """It was sent to the NPU, where it may hang for ever."""
    story = Story()

    story.guard.hold("Hands off.", story.now)
    story.goes_on()
    story.is_replaced(State.DEGRADED, "cpu")

    assert story.guard.wanted() == CPU_QUEUES
    assert story.guard.health.code == Reason.OPERATOR


def test_order_holds_a_child_that_finds_its_npu_by_itself() -> None:
    """As after a probe of a node that began without its NPU: where it is, it says late."""
    story = Story(None)
    story.goes_on(home="")

    story.guard.hold("Hands off.", story.now)
    story.goes_on(home="npu")
    story.is_replaced(State.DEGRADED, "cpu")

    assert story.guard.wanted() == CPU_QUEUES
    assert story.guard.health.code == Reason.OPERATOR


def test_held_node_without_an_npu_takes_nothing() -> None:
    """That is how an operator drains a node on the CPU."""
    story = Story(device="cpu")
    story.guard.placement = Placement(Device.CPU, Device.CPU, "EMBEDQ_DEVICE=cpu")
    story.goes_on(state=State.HEALTHY, home="cpu", device="cpu")
    assert story.guard.wanted() == CPU_QUEUES

    story.guard.hold("Going home.", story.now)
    assert story.guard.wanted() == ()
    assert story.guard.replaces == 0

    story.guard.release(story.now)
    assert story.guard.wanted() == CPU_QUEUES


def test_order_during_a_probe_ends_the_probe() -> None:
    """It holds the lock of a device that the operator may want to touch."""
    story = Story()
    story.is_healthy()
    story.degrades()
    story.goes_on(31)

    story.guard.hold("Hands off.", story.now)

    assert story.probe.stopped


def test_node_whose_state_file_is_cleared_away_goes_on() -> None:
    """What its child said last holds until it says something else."""
    story = Story()
    story.is_healthy()

    story.guard.look(None, story.now, story.now)

    assert story.guard.wanted() == NPU_QUEUES
