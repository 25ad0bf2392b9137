"""Which queues a node in which state consumes: the table of the design, line by line."""

from __future__ import annotations

import pytest

from embedq.contract import Device, Queue
from embedq_worker.health import queues_for
from embedq_worker.state import NodeState, State


def node(state: State, device: Device) -> NodeState:
    """Return a node of the CPU or the stub in a state."""
    return NodeState(state, since=0.0, pid=1, device=str(device), home=str(device))


@pytest.mark.parametrize("device", [Device.CPU, Device.STUB])
def test_healthy_node_takes_its_own_queue_first(device: Device) -> None:
    """A node without an NPU serves embed.cpu, and helps with embed.npu."""
    assert queues_for(node(State.HEALTHY, device)) == (Queue.CPU, Queue.NPU)


def test_helping_can_be_switched_off() -> None:
    """A setting keeps a node of the CPU to embed.cpu."""
    assert queues_for(node(State.HEALTHY, Device.CPU), helps=False) == (Queue.CPU,)


@pytest.mark.parametrize("state", [state for state in State if state is not State.HEALTHY])
def test_node_that_cannot_serve_takes_nothing(state: State) -> None:
    """Starting, failed or degraded, a node of the CPU consumes no queue."""
    assert queues_for(node(state, Device.CPU)) == ()


def test_node_of_no_known_state_takes_nothing() -> None:
    """Before the child has said anything, nothing is consumed."""
    assert queues_for(None) == ()


@pytest.mark.parametrize("state", State)
def test_strict_batches_never_reach_a_cpu(state: State) -> None:
    """Whatever its state, no node that computes on a CPU consumes the strict queue."""
    assert Queue.NPU_STRICT not in queues_for(node(state, Device.CPU))
