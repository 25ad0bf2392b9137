"""When an NPU is trusted and tried again, and what a node consumes: the table, row by row."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import ModelCard, State
from embedq_worker.errors import Reason
from embedq_worker.main_process.device_health import Health, Rules, may_answer, queues_for
from embedq_worker.main_process.status import NodeState

NOTHING: tuple[Queue, ...] = ()
CPU_FIRST = (Queue.CPU, Queue.NPU)
NPU_ONLY = (Queue.NPU, Queue.NPU_STRICT)


def node(state: State, home: str, device: str) -> NodeState:
    """Return the state of a node."""
    return NodeState(state, 0.0, 1, home=home, device=device)


@pytest.mark.parametrize(
    ("state", "home", "device", "queues"),
    [
        (State.STARTING, "npu", "", NOTHING),
        (State.STARTING, "cpu", "", NOTHING),
        (State.PROBING, "npu", "", NOTHING),
        (State.DEGRADED, "npu", "", NOTHING),
        (State.FAILED, "npu", "cpu", NOTHING),
        (State.HEALTHY, "npu", "npu", NPU_ONLY),
        (State.HEALTHY, "npu", "stub", NPU_ONLY),
        (State.DEGRADED, "npu", "npu", NOTHING),
        (State.DEGRADED, "npu", "cpu", CPU_FIRST),
        (State.PROBING, "npu", "cpu", CPU_FIRST),
        (State.HEALTHY, "cpu", "cpu", CPU_FIRST),
        (State.HEALTHY, "stub", "stub", CPU_FIRST),
        *[(state, "cpu", "cpu", NOTHING) for state in State if state is not State.HEALTHY],
    ],
)
def test_queues_follow_from_state_and_device(
    state: State, home: str, device: str, queues: tuple[Queue, ...]
) -> None:
    """A row of the table."""
    assert queues_for(node(state, home, device)) == queues


def test_node_with_a_quantised_copy_reads_the_queue_of_int8() -> None:
    """A node of the CPU that announces a copy, and no node of an NPU."""
    card = ModelCard("m", "ab" * 32, 8, 16, quantised="copy")
    on_cpu = replace(node(State.HEALTHY, "cpu", "cpu"), card=card)
    on_npu = replace(node(State.HEALTHY, "npu", "npu"), card=card)

    assert queues_for(on_cpu) == (Queue.CPU, Queue.CPU_INT8, Queue.NPU)
    assert queues_for(on_cpu, helps=False) == (Queue.CPU, Queue.CPU_INT8)
    assert queues_for(on_npu) == NPU_ONLY


def test_node_without_a_state_consumes_nothing() -> None:
    """Its child has not spoken yet."""
    assert queues_for(NodeState(State.STARTING, 1.0, 0)) == NOTHING


def test_node_may_be_kept_to_its_own_queue() -> None:
    """EMBEDQ_HELP_NPU=0 keeps a node of the CPU to embed.cpu."""
    assert queues_for(node(State.HEALTHY, "cpu", "cpu"), helps=False) == (Queue.CPU,)


def test_no_cpu_ever_gets_a_strict_batch() -> None:
    """Whatever the state, a node that computes on a CPU does not consume the strict queue."""
    for state, home, helps in product(State, ("npu", "cpu", "stub", ""), (True, False)):
        assert Queue.NPU_STRICT not in queues_for(node(state, home, "cpu"), helps=helps)
    assert not may_answer("embed.npu.strict", Device.CPU)
    assert may_answer("embed.npu.strict", Device.NPU)
    assert may_answer("embed.npu", Device.CPU)


def test_paused_fleet_consumes_nothing() -> None:
    """Whatever its state."""
    for state, home, device in product(State, ("npu", "cpu", "stub"), ("npu", "cpu", "stub", "")):
        assert queues_for(node(state, home, device), paused=True) == NOTHING


RULES = Rules(probe_first_s=30, probe_longest_s=600, settle_s=600)


def healthy(since: float = 0.0) -> Health:
    """Return the health of an NPU that has proven itself."""
    return Health().proven(since)


def test_degraded_npu_says_why_and_since_when() -> None:
    """Code, sentence and time are those of the fault."""
    health = healthy().degraded(Reason.DEVICE_LOST, "It is gone.", 100.0, RULES)

    assert (health.state, health.code, health.reason) == (
        State.DEGRADED,
        "device_lost",
        "It is gone.",
    )
    assert (health.since, health.count, health.probe_at) == (100.0, 1, 130.0)
    assert health.may_return


def test_first_reason_stays() -> None:
    """What an NPU does after it was given up is no news; an operator's word is."""
    lost = healthy().degraded(Reason.DEVICE_LOST, "It is gone.", 100.0, RULES)

    assert lost.degraded(Reason.SLOW, "It is slow.", 101.0, RULES) == lost
    held = lost.degraded(Reason.OPERATOR, "A new driver.", 102.0, RULES)
    assert (held.reason, held.since, held.probe_at) == ("A new driver.", 102.0, math.inf)


def test_probes_rest_longer_and_longer() -> None:
    """30 s, then twice as long after every failure, and never over ten minutes."""
    health = healthy().degraded(Reason.NOT_FINITE, "", 0.0, RULES)

    pauses = []
    for _ in range(7):
        pauses.append(health.probe_at)
        assert not health.probe_due(health.probe_at - 0.1)
        assert health.probe_due(health.probe_at)
        health = health.probing().probe_failed("selftest_failed", "Still wrong.", 0.0, RULES)

    assert pauses == [30, 60, 120, 240, 480, 600, 600]
    assert (health.reason, health.since) == ("Still wrong.", 0.0)


def test_flapping_npu_is_damped() -> None:
    """One that fails soon after it came back rests as if it had never come; settled, it is new."""
    back = healthy().degraded(Reason.SLOW, "", 0.0, RULES).probing().returning().proven(40.0)

    soon = back.degraded(Reason.SLOW, "", 40.0 + 599.0, RULES)
    later = back.degraded(Reason.SLOW, "", 40.0 + 600.0, RULES)

    assert (soon.count, soon.probe_at - 639.0) == (2, 60.0)
    assert (later.count, later.probe_at - 640.0) == (1, 30.0)


@pytest.mark.parametrize("code", [Reason.NO_COMPILER, Reason.COMPILE_REFUSED, "no_device"])
def test_structural_reasons_are_not_probed(code: str) -> None:
    """Trying again changes nothing, so strict jobs need not wait either."""
    health = Health().degraded(code, "", 0.0, RULES)

    assert health.probe_at == math.inf
    assert not health.may_return
    assert not health.probe_due(1e12)


def test_operator_has_it_probed_at_once() -> None:
    """Also where no probe was planned; a healthy one is left alone."""
    held = healthy().degraded(Reason.OPERATOR, "", 5.0, RULES)

    assert held.recovered(7.0).probe_due(7.0)
    assert healthy().recovered(7.0) == healthy()


def test_clock_set_back_does_not_delay_a_probe() -> None:
    """A clock before the fault itself is no reason to wait for it to come round again."""
    health = healthy(5e9).degraded(Reason.SLOW, "", 5e9, RULES)

    assert health.probe_due(1e9)


def test_clock_set_back_does_not_take_the_pause_from_probes() -> None:
    """One that fails rests as long as at any other time."""
    health = healthy(5e9).degraded(Reason.SLOW, "", 5e9, RULES)

    failed = health.probing().probe_failed("selftest_failed", "Still wrong.", 1e9, RULES)

    assert not failed.probe_due(1e9 + 59)
    assert failed.probe_due(1e9 + 60)
