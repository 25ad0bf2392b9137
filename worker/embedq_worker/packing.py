"""Ragged tokens -> token batches of a form. Pure numpy: no runtime, no clock, no threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_worker.tokens import RaggedTokens

Ints = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]

#: Tokens of the smallest bucket; a foreign model that needs less than these is not worth a shape.
MIN_BUCKET: Final = 16
#: Tokens of the narrowest row that texts share. Attention costs the square of the width, and a
#: narrower row is hard to fill: 32 won nothing for docstrings, 1 to 3 % for titles (2026-11-27).
MIN_SHARED: Final = 64
#: Numbers that one instruction of a CPU takes: OpenVINO works through what is left of a row after
#: these one by one. Attention over 9 rows of 60 tokens took 2.8 times as long in bf16, and 1.9
#: times in f32, as over 8 of 64 (2026.4 on Zen 5, 2026-11-27).
LANES: Final = 16


class Form(StrEnum):
    """How texts lie in token batches."""

    PADDED = "padded"
    SHARED = "shared"
    PACKED = "packed"
    BUCKETS = "buckets"


@dataclass(frozen=True, slots=True)
class RowForm:
    """The token batches that an engine takes.

    Attributes:
        form: ``padded``, [B, T] of any size with one text a row; ``shared``, the same, and rows of
            some widths may hold several texts; ``packed``, one row [1, T] with several texts;
            ``buckets``, one row [1, T] with one text.
        widths: the tokens T that a row may have, rising; for ``shared`` those of a row that holds
            several texts; empty for ``padded``.
    """

    form: Form = Form.PADDED
    widths: tuple[int, ...] = ()

    @classmethod
    def shared(cls, max_length: int) -> RowForm:
        """Describe rows that texts share: powers of two up to what takes the longest text."""
        longest = next_lanes(max_length)
        widths = []
        width = MIN_SHARED
        while width < longest:
            widths.append(width)
            width *= 2
        return cls(Form.SHARED, (*widths, longest))

    @classmethod
    def packed(cls, width: int) -> RowForm:
        """Describe packed rows of this many tokens."""
        return cls(Form.PACKED, (width,))

    @classmethod
    def buckets(cls, max_length: int) -> RowForm:
        """Describe rows of one text, padded to a power of two or to the longest text there is."""
        widths = []
        width = MIN_BUCKET
        while width < max_length:
            widths.append(width)
            width *= 2
        return cls(Form.BUCKETS, (*widths, max_length))

    @property
    def is_static(self) -> bool:
        """Say whether every token batch has one of a few shapes."""
        return self.form in (Form.PACKED, Form.BUCKETS)

    def segments(self, width: int) -> int:
        """Return how many texts a row of this width has room for: each has two tokens or more."""
        return max(1, width // 2) if self.form in (Form.PACKED, Form.SHARED) else 1

    def width_for(self, n_tokens: int) -> int:
        """Return the smallest width that takes this many tokens."""
        return next(width for width in self.widths if width >= n_tokens)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows for one forward pass, each with up to S texts one after the other.

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


def build_padded(
    tokens: RaggedTokens, members: Sequence[int] | Indices, pad_id: int, width: int = 0
) -> TokenBatch:
    """Place each text in a row of its own.

    Args:
        tokens: the tokens of all texts.
        members: which of the texts to place, one per row.
        pad_id: token that fills the rest of a row; never attended to.
        width: tokens of a row; 0 for as many as the longest of them has.
    """
    rows = np.asarray(members, np.intp)
    starts = tokens.offsets[rows]
    lengths = tokens.offsets[rows + 1] - starts
    places = np.arange(width or max(1, int(lengths.max(initial=0))), dtype=np.int64)
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


def build_rows(
    tokens: RaggedTokens, rows: Sequence[Sequence[int] | Indices], pad_id: int, form: RowForm
) -> list[TokenBatch]:
    """Place texts one after the other in static rows, each a token batch with B of 1.

    All rows are built at once: one by one they cost 10 us a text, more than all else that a fast
    device waits for but tokenizing; this way 3 us (rows of 256, four texts each, measured
    2026-11-23).

    Args:
        tokens: the tokens of all texts.
        rows: for each row which of the texts to place; none is empty.
        pad_id: token that fills the rest of a row; never attended to.
        form: packed rows or buckets.
    """
    if form.form is Form.BUCKETS:
        lengths = tokens.lengths
        widths = [form.width_for(int(lengths[list(row)].sum())) for row in rows]
        return [
            build_padded(tokens, row, pad_id, width)
            for row, width in zip(rows, widths, strict=True)
        ]
    if not rows:
        return []
    (width,) = form.widths
    whole = _lay(tokens, rows, pad_id, width, form.segments(width))
    return [
        TokenBatch(
            whole.input_ids[row : row + 1],
            whole.position_ids[row : row + 1],
            whole.segment_ids[row : row + 1],
            whole.segments,
            whole.members[row : row + 1],
        )
        for row in range(len(rows))
    ]


def build_shared(
    tokens: RaggedTokens, rows: Sequence[Sequence[int] | Indices], pad_id: int, width: int
) -> TokenBatch:
    """Place texts one after the other in rows of one token batch.

    Args:
        tokens: the tokens of all texts.
        rows: for each row which of the texts to place; there is one, and none is empty.
        pad_id: token that fills the rest of a row; never attended to.
        width: tokens of a row; no row has more.
    """
    return _lay(tokens, rows, pad_id, width, max(map(len, rows)))


def _lay(
    tokens: RaggedTokens,
    rows: Sequence[Sequence[int] | Indices],
    pad_id: int,
    width: int,
    n_segments: int,
) -> TokenBatch:
    counts = np.array([len(row) for row in rows])
    texts = np.concatenate([np.asarray(row, np.intp) for row in rows])
    row_of = np.repeat(np.arange(len(rows)), counts)
    first = np.cumsum(counts) - counts  # the first text of each row, among all texts
    seat = np.arange(len(texts)) - first[row_of]
    starts = tokens.offsets[texts]
    lengths = tokens.offsets[texts + 1] - starts
    before = np.cumsum(lengths) - lengths  # tokens of the texts before, in all rows
    target = row_of * width + before - before[first][row_of]
    # From here on per token: its place in its text, and where it goes.
    places = np.arange(int(lengths.sum())) - np.repeat(before, lengths)
    flat = np.repeat(target, lengths) + places
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    position_ids, segment_ids = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    input_ids.reshape(-1)[flat] = tokens.ids[np.repeat(starts, lengths) + places]
    position_ids.reshape(-1)[flat] = places
    segment_ids.reshape(-1)[flat] = np.repeat(seat + 1, lengths)
    segments = np.arange(1, n_segments + 1, dtype=np.int64)
    members = np.full((len(rows), n_segments), -1, np.int64)
    members[row_of, seat] = texts
    return TokenBatch(input_ids, position_ids, segment_ids, segments, members)


def next_lanes(width: int) -> int:
    """Return the next width that leaves nothing after whole LANES."""
    return -(-width // LANES) * LANES
