"""How much a producer may have in flight. Pure: numbers in, a decision out.

Redis refuses everything once it is full, acknowledgements and deletions included, so a producer
stops long before that, and resumes only when there is room to run for a while.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

#: Share of Redis' memory at which publishing pauses, at which a new job is refused, and below which
#: a paused one resumes.
PAUSE_RATIO: Final = 0.60
REFUSE_RATIO: Final = 0.80
RESUME_RATIO: Final = 0.50
#: Batches per living node that a job may have in flight, and the bounds of that.
BATCHES_PER_NODE: Final = 4
MIN_WINDOW: Final = 16
MAX_WINDOW: Final = 256


class Flow(StrEnum):
    """Whether a producer may publish."""

    RUN = "run"
    PAUSE = "pause"
    REFUSE = "refuse"


def flow(ratio: float, before: Flow) -> Flow:
    """Decide from the fullest Redis; paused stays paused until there is real room.

    Args:
        ratio: used share of its memory.
        before: the last decision.
    """
    if ratio >= REFUSE_RATIO:
        return Flow.REFUSE
    if ratio >= PAUSE_RATIO:
        return Flow.PAUSE
    if before is not Flow.RUN and ratio >= RESUME_RATIO:
        return Flow.PAUSE
    return Flow.RUN


def window(live_nodes: int, setting: int) -> int:
    """Return how many batches a job may have in flight.

    Small windows are what makes producers share fairly: a big job never has more than this in
    front of a small one.

    Args:
        live_nodes: nodes alive.
        setting: fixed by the user; 0 leaves it to the fleet.
    """
    return setting or min(MAX_WINDOW, max(MIN_WINDOW, BATCHES_PER_NODE * live_nodes))
