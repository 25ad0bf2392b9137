"""Build token batches from ragged tokens and a plan. No runtime, clock or thread enters here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from embedq_worker.engines.base import RaggedTokens, RowFormat, RowSpec, TokenBatch

Indices = npt.NDArray[np.intp]


def build_padded(
    tokens: RaggedTokens, members: Sequence[int] | Indices, pad_id: int, width: int = 0
) -> TokenBatch:
    """Place each text in a row of its own.

    Args:
        tokens: tokens of all texts.
        members: indices of the texts to place, one per row.
        pad_id: padding token; attention ignores it.
        width: width of a row in tokens; 0 = the longest of these texts.
    """
    rows = np.asarray(members, np.intp)
    starts = tokens.offsets[rows]
    lengths = tokens.offsets[rows + 1] - starts
    positions = np.arange(width or max(1, int(lengths.max(initial=0))), dtype=np.int64)
    real = positions < lengths[:, None]  # [B, T]
    input_ids = np.full(real.shape, pad_id, np.int64)
    input_ids[real] = tokens.ids[(starts[:, None] + positions)[real]]
    return TokenBatch(
        input_ids=input_ids,
        position_ids=np.broadcast_to(positions, real.shape).copy(),
        segment_ids=real.astype(np.int64),
        segments=np.ones(1, np.int64),
        members=rows.astype(np.int64)[:, None],
    )


def build_rows(
    tokens: RaggedTokens, rows: Sequence[Sequence[int] | Indices], pad_id: int, row_spec: RowSpec
) -> list[TokenBatch]:
    """Place texts one after the other in static rows; each row is a token batch with B = 1.

    All rows are built in one array operation, which takes a third of the time of a loop over rows.

    Args:
        tokens: tokens of all texts.
        rows: for each row the indices of its texts; no row is empty.
        pad_id: padding token; attention ignores it.
        row_spec: packed rows or buckets.
    """
    if row_spec.format is RowFormat.BUCKETS:
        lengths = tokens.lengths
        widths = [row_spec.width_for(int(lengths[list(row)].sum())) for row in rows]
        return [
            build_padded(tokens, row, pad_id, width)
            for row, width in zip(rows, widths, strict=True)
        ]
    if not rows:
        return []
    (width,) = row_spec.widths
    batch = _place_tokens(tokens, rows, pad_id, width, row_spec.segments(width))
    return [
        TokenBatch(
            batch.input_ids[row : row + 1],
            batch.position_ids[row : row + 1],
            batch.segment_ids[row : row + 1],
            batch.segments,
            batch.members[row : row + 1],
        )
        for row in range(len(rows))
    ]


def build_shared(
    tokens: RaggedTokens, rows: Sequence[Sequence[int] | Indices], pad_id: int, width: int
) -> TokenBatch:
    """Place texts one after the other in rows of one token batch.

    Args:
        tokens: tokens of all texts.
        rows: for each row the indices of its texts; at least one row, and none is empty.
        pad_id: padding token; attention ignores it.
        width: width of a row in tokens; every row fits.
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
    segment = np.arange(len(texts)) - first[row_of]
    starts = tokens.offsets[texts]
    lengths = tokens.offsets[texts + 1] - starts
    before = np.cumsum(lengths) - lengths  # tokens of all preceding texts
    target = row_of * width + before - before[first][row_of]
    # Per token: its position in its text, and its index in the flat rows.
    positions = np.arange(int(lengths.sum())) - np.repeat(before, lengths)
    flat = np.repeat(target, lengths) + positions
    input_ids = np.full((len(rows), width), pad_id, np.int64)
    position_ids, segment_ids = (np.zeros((len(rows), width), np.int64) for _ in range(2))
    input_ids.reshape(-1)[flat] = tokens.ids[np.repeat(starts, lengths) + positions]
    position_ids.reshape(-1)[flat] = positions
    segment_ids.reshape(-1)[flat] = np.repeat(segment + 1, lengths)
    segments = np.arange(1, n_segments + 1, dtype=np.int64)
    members = np.full((len(rows), n_segments), -1, np.int64)
    members[row_of, segment] = texts
    return TokenBatch(input_ids, position_ids, segment_ids, segments, members)


def exclude_prompt(batch: TokenBatch, n_tokens: int, except_for: int) -> TokenBatch:
    """Leave the prompt at the start of each text out of the pooling: its segments become negative.

    Args:
        batch: rows of texts that start with the prompt.
        n_tokens: tokens of the prompt, those that the tokenizer puts before it included.
        except_for: index of a text that does not start with it.
    """
    texts = np.take_along_axis(batch.members, np.maximum(batch.segment_ids - 1, 0), axis=1)
    is_prompt = (batch.position_ids < n_tokens) & (texts != except_for)
    segment_ids = np.where(is_prompt, -batch.segment_ids, batch.segment_ids)
    return replace(batch, segment_ids=segment_ids)


def skip_pad_tokens(batch: TokenBatch, pad_id: int) -> TokenBatch:
    """Count positions as RoBERTa does: a padding token within a text has position -1, no other.

    Only a text that spells the padding token contains one.

    Source: transformers, models/roberta/modeling_roberta.py, create_position_ids_from_input_ids.
    """
    is_pad = (batch.input_ids == pad_id) & (batch.segment_ids != 0)
    if not is_pad.any():
        return batch
    so_far = np.cumsum(is_pad, axis=1)
    first = np.arange(is_pad.shape[1]) - batch.position_ids
    before_text = np.take_along_axis(so_far - is_pad, first, axis=1)
    positions = np.where(is_pad, -1, batch.position_ids - (so_far - before_text))
    return replace(batch, position_ids=np.where(batch.segment_ids != 0, positions, 0))
