"""Which queues a node consumes: the whole table, row by row."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from embedq.contract import Device, ModelCard, Queue
from embedq_worker.health import EarlyDeaths, may_answer, queues_for
from embedq_worker.state import NodeState, State
from embedq_worker.supervisor import CRASHES, WINDOW_S

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
    assert queues_for(None) == NOTHING


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


def child(pid: int, state: State = State.STARTING) -> NodeState:
    """Return what a child says of itself."""
    return NodeState(state, 0.0, pid)


def test_children_that_die_before_they_are_ready_are_a_loop() -> None:
    """The fifth replacement of a child that never came up ends the node."""
    deaths = EarlyDeaths()

    answers = [deaths.is_loop(child(pid), now_s=pid) for pid in range(CRASHES + 1)]

    assert answers == [False] * CRASHES + [True]


def test_children_that_served_are_no_loop() -> None:
    """What dies under a batch is the batch's matter."""
    deaths = EarlyDeaths()

    for pid in range(20):
        assert not deaths.is_loop(child(pid), now_s=pid)
        assert not deaths.is_loop(child(pid, State.HEALTHY), now_s=pid)


def test_rare_deaths_are_no_loop() -> None:
    """One a window may go on for ever."""
    deaths = EarlyDeaths()

    assert not any(deaths.is_loop(child(pid), now_s=pid * WINDOW_S) for pid in range(20))
