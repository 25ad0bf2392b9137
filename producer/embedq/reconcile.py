"""Which batches are lost, decided from what Redis holds. Pure: the clock and the view come in.

Redis hands a message to a node before the node can note that it has it; a node that dies in between
takes the message with it, and nothing in Redis says so. Such a batch is outstanding and nowhere to
be found. Publishing it again is always safe, because the ledger takes the first commit only; the
rules here keep it from being done for a batch that only waits its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sent:
    """A batch that was published and has no commit yet.

    Attributes:
        task_id: of its message.
        published: Unix time of the last publish, in seconds.
        missed: Unix time at which it was first not to be found, None if it was found last time.
    """

    task_id: str
    published: float
    missed: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    """What Redis holds at one moment.

    Attributes:
        in_hand: ids of the tasks that some node has popped and not acknowledged.
        oldest: queue -> Unix time at which its oldest message was published; None when empty.
        settled: no node is probing and nobody has paused the queues.
    """

    in_hand: frozenset[str]
    oldest: Mapping[str, float | None]
    settled: bool


def is_missing(sent: Sent, view: View, *, visibility_timeout_s: float) -> bool:
    """Tell whether a batch is neither in a node's hand nor can be waiting in a queue.

    A queue is first in, first out, so a batch that was published long before the oldest message of
    a queue is not in it. "Long" covers clocks that differ and messages put back at the front.
    """
    if not view.settled or sent.task_id in view.in_hand:
        return False
    horizon = sent.published + 2 * visibility_timeout_s
    return all(oldest is None or oldest > horizon for oldest in view.oldest.values())


def is_lost(sent: Sent, now: float, *, patience_s: float) -> bool:
    """Tell whether a missing batch has been missing for long enough.

    For a moment every message is in nobody's hand, on its way from the queue to a node.
    """
    return sent.missed is not None and now - sent.missed >= patience_s
