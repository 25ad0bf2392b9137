"""Ragged tokens -> token batches. Pure numpy: no runtime, no clock, no threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_worker.tokens import RaggedTokens

Ints = npt.NDArray[np.int64]

#: Padded tokens below which a token batch is not shrunk further: smaller ones cost more in calls
#: than they win in balance.
MIN_BUDGET: Final = 128


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows for one forward pass. Padded: a row is one text, S is 1. Packed: a row holds S texts.

    Attributes:
        input_ids: tokens, int64 [B, T].
        position_ids: place of each token in its own text, int64 [B, T].
        segment_ids: 0 for padding, 1.. for the segment that a token belongs to, int64 [B, T].
        segments: the numbers 1..S, int64 [S].
        members: which text each segment is, -1 for none, int64 [B, S].
    """

    input_ids: Ints
    position_ids: Ints
    segment_ids: Ints
    segments: Ints
    members: Ints

    @property
    def n_texts(self) -> int:
        """Count the texts in the batch."""
        return int(np.count_nonzero(self.members >= 0))


def plan_padded(
    lengths: npt.ArrayLike, token_budget: int, streams: int = 1
) -> list[npt.NDArray[np.intp]]:
    """Group texts of like length so that each group fills a token batch without much padding.

    The longest go first; equal lengths keep their order, so the plan depends on nothing but its
    arguments. A text longer than the budget goes alone.

    Args:
        lengths: tokens of each text.
        token_budget: most padded tokens in one group.
        streams: groups that will run at once at the end; the last groups shrink so that these
            streams finish together. 1 shrinks none.

    Returns:
        For each group the indices of its texts, longest first.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    remaining = int(sizes.sum())
    groups = []
    at = 0
    while at < len(order):
        budget = token_budget
        if streams > 1:
            # A share of half of what each stream has left: big groups first, small ones last.
            budget = min(budget, max(MIN_BUDGET, remaining // (2 * streams)))
        longest = max(1, int(sizes[order[at]]))
        group = order[at : at + max(1, budget // longest)]
        remaining -= int(sizes[group].sum())
        groups.append(group)
        at += len(group)
    return groups


def build_padded(
    tokens: RaggedTokens, members: Sequence[int] | npt.NDArray[np.intp], pad_id: int
) -> TokenBatch:
    """Place each text in a row of its own, as wide as the longest of them.

    Args:
        tokens: the tokens of all texts.
        members: which of the texts to place, one per row.
        pad_id: token that fills the rest of a row; never attended to.
    """
    rows = np.asarray(members, np.intp)
    starts = tokens.offsets[rows]
    lengths = tokens.offsets[rows + 1] - starts
    places = np.arange(max(1, int(lengths.max(initial=0))), dtype=np.int64)
    real = places < lengths[:, None]  # [B, T]
    input_ids = np.full(real.shape, pad_id, np.int64)
    input_ids[real] = tokens.ids[(starts[:, None] + places)[real]]
    return TokenBatch(
        input_ids=input_ids,
        position_ids=np.broadcast_to(places, real.shape).copy(),
        segment_ids=real.astype(np.int64),
        segments=np.ones(1, np.int64),
        members=rows.astype(np.int64)[:, None],
    )
