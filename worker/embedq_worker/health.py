"""What follows from the state of a node alone. Pure: no clock, no Redis, no other node."""

from __future__ import annotations

from embedq.contract import Device, Queue
from embedq_worker.state import NodeState, State
from embedq_worker.supervisor import CRASHES, WINDOW_S

#: States in which a node of the NPU may lend its CPU to the queues.
_ON_ITS_CPU = (State.HEALTHY, State.DEGRADED, State.PROBING)


def queues_for(node: NodeState | None, *, helps: bool = True) -> tuple[Queue, ...]:
    """Return the queues that a node in this state consumes, first choice first.

    Strict batches are for a healthy NPU: no engine on a CPU ever gets one.

    Args:
        node: its state; None before it has any.
        helps: a node of the CPU also takes what waits for an NPU.
    """
    if node is None:
        return ()
    if node.home == Device.NPU:
        if node.device == Device.CPU:
            return (Queue.CPU, Queue.NPU) if node.state in _ON_ITS_CPU else ()
        return (Queue.NPU, Queue.NPU_STRICT) if node.state is State.HEALTHY else ()
    if node.state is not State.HEALTHY:
        return ()
    own = (Queue.CPU, Queue.CPU_INT8) if node.card and node.card.quantised else (Queue.CPU,)
    return (*own, Queue.NPU) if helps else own


def may_answer(queue: str, device: Device) -> bool:
    """Tell whether a batch of this queue may be computed on this device.

    A node that lost its NPU may still have a strict batch in hand.
    """
    return queue != Queue.NPU_STRICT or device is not Device.CPU


class EarlyDeaths:
    """Counts children that died before they were ready; Celery replaces them without end."""

    def __init__(self) -> None:
        self._last: NodeState | None = None
        self._deaths: list[float] = []

    def is_loop(self, node: NodeState | None, now_s: float) -> bool:
        """Take note of the node's state, and tell whether its children die again and again.

        Args:
            node: its state at this look; looks may miss a child, which only makes this slower.
            now_s: seconds on a clock that never goes back.
        """
        last, self._last = self._last, node
        if last is None or node is None or node.pid == last.pid:
            return False
        if last.state is State.STARTING:
            recent = [at for at in self._deaths if now_s - at < WINDOW_S]
            self._deaths = [*recent, now_s]
        return len(self._deaths) >= CRASHES
