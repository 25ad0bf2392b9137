"""Ragged tokens -> token batches of a form. Pure numpy: no runtime, no clock, no threads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from embedq_worker.engines.base import RaggedTokens, RowFormat, RowSpec, TokenBatch

Indices = npt.NDArray[np.intp]


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
    tokens: RaggedTokens, rows: Sequence[Sequence[int] | Indices], pad_id: int, form: RowSpec
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
    if form.format is RowFormat.BUCKETS:
        lengths = tokens.lengths
        widths = [form.width_for(int(lengths[list(row)].sum())) for row in rows]
        return [
            build_padded(tokens, row, pad_id, width)
            for row, width in zip(rows, widths, strict=True)
        ]
    if not rows:
        return []
    (width,) = form.widths
    whole = _place_tokens(tokens, rows, pad_id, width, form.segments(width))
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
    return _place_tokens(tokens, rows, pad_id, width, max(map(len, rows)))


def _place_tokens(
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
