"""Careful mode: one text at a time, for a batch that stopped the processes that tried it.

Before each text its offset is noted in the ledger, so that a process that dies leaves behind which
text it died of. A text that has stopped two is tried once more, alone, on the CPU; after that it is
set aside, and the rest of the batch is embedded as if it were not there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np

from embedq.contract import Code, EmbedBatch, Outcome, Status
from embedq.outcomes import OutcomeTable
from embedq.vectors import Vectors
from embedq_worker.errors import EngineError

#: The delivery of a batch at which it runs in careful mode.
CAREFUL_AT = 3
#: Starts of one text that nothing survived after which it is set aside.
MAX_STARTS = 3

#: Embeds a batch; the flag asks for the engine on the CPU.
Embed = Callable[[EmbedBatch, bool], tuple[Vectors, OutcomeTable]]


class Notes(Protocol):
    """Where the offsets are noted, out of reach of a dying process."""

    def start(self, offset: int) -> int:
        """Note that a text is tried, and return how often it was, this time included."""

    def end(self, offset: int) -> None:
        """Note that a text was survived."""

    def set_aside(self, offset: int, reason: str) -> None:
        """Keep a text for a person to look at."""


def embed_carefully(batch: EmbedBatch, embed: Embed, notes: Notes) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch text by text.

    Returns:
        float32 [n, D], NaN for a text that was set aside or refused, and n outcomes.
    """
    vectors = np.full((len(batch.texts), batch.spec.dim), np.nan, np.float32)
    outcomes: list[Outcome] = []
    for offset, text in enumerate(batch.texts):
        if offset in batch.refused:
            outcomes.append(Outcome(status=Status.FAILED, code=batch.refused[offset]))
            continue
        alone = replace(batch, texts=[text], refused={})
        found = _embed_one(alone, offset, embed, notes)
        if found is None:
            outcomes.append(Outcome(status=Status.FAILED, code=Code.SET_ASIDE))
        else:
            vectors[offset] = found[0][0]
            outcomes.append(found[1][0])
    return vectors, OutcomeTable.from_outcomes(outcomes)


def _embed_one(
    alone: EmbedBatch, offset: int, embed: Embed, notes: Notes
) -> tuple[Vectors, OutcomeTable] | None:
    """Embed one text, or return None when it has used up its chances."""
    reason = "every process that tried it died or hung"
    while (starts := notes.start(offset)) <= MAX_STARTS:
        try:
            found = embed(alone, starts == MAX_STARTS)
        except EngineError as error:
            reason = str(error)
        else:
            notes.end(offset)
            return found
    notes.set_aside(offset, reason)
    return None
