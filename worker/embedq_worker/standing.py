"""How a node is, from what its child says of itself and what its parent thinks of the NPU. Pure."""

from __future__ import annotations

from dataclasses import replace

from embedq_worker.health import AWAY, Health
from embedq_worker.state import NodeState, State


def standing(child: NodeState, health: Health, *, leaves: bool, held: bool) -> NodeState:
    """Return how a node is, for itself and for everybody else.

    Args:
        child: what the child says.
        health: what the node thinks of its NPU.
        leaves: the child has been ended, or will be as soon as it holds no batch.
        held: an operator keeps the node as it is.
    """
    if health.state in AWAY:
        state = child
        if child.state is State.STARTING or leaves:
            # Its replacement is on the way; nothing computes.
            state = replace(child, device="", engine="", precision="")
        return replace(
            state,
            state=health.state,
            code=health.code,
            reason=health.reason,
            since=health.since,
            count=health.count,
            probe_at=0.0 if health.probe_at == float("inf") else health.probe_at,
            may_return=health.may_return or held,
        )
    if leaves:
        return replace(child, state=State.STARTING, device="", engine="", precision="")
    return replace(child, count=health.count)
