"""Tests of building token batches from planned rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_worker.engines.base import RaggedTokens, RowSpec
from embedq_worker.inference.packing import build_padded, build_rows, build_shared
from embedq_worker.inference.planning import plan_packed


def ragged(lengths: list[int]) -> RaggedTokens:
    """Return texts of these lengths whose tokens count up from 1."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return RaggedTokens(ids, offsets, np.zeros(len(lengths), np.uint32))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.randoms())
def test_padded_rows_hold_tokens_positions_and_padding(lengths: list[int], random: object) -> None:
    tokens = ragged(lengths)
    members = list(range(len(lengths)))[::-1]

    batch = build_padded(tokens, members, pad_id=0)

    assert batch.input_ids.shape == (len(lengths), max(lengths))
    assert batch.n_texts == len(lengths)
    for row, text in enumerate(members):
        n = lengths[text]
        start = int(tokens.offsets[text])
        assert list(batch.input_ids[row, :n]) == list(tokens.ids[start : start + n])
        assert not batch.input_ids[row, n:].any()
        assert list(batch.segment_ids[row]) == [1] * n + [0] * (max(lengths) - n)
        assert list(batch.position_ids[row, :n]) == list(range(n))
    assert list(batch.members[:, 0]) == members


def test_padded_batch_has_contiguous_int64_arrays() -> None:
    batch = build_padded(ragged([2, 3]), [1, 0], pad_id=0)

    for name in ("input_ids", "position_ids", "segment_ids", "segments", "members"):
        array = getattr(batch, name)
        assert array.dtype == np.int64, name
        assert array.flags.c_contiguous, name
    assert list(batch.segments) == [1]


PACKED = RowSpec.packed(32)


@given(st.lists(st.integers(2, 32), max_size=60), st.integers(1, 9))
def test_packed_rows_hold_texts_as_numbered_segments(lengths: list[int], pad_id: int) -> None:
    tokens = ragged(lengths)
    rows = [list(row) for row in plan_packed(lengths, PACKED)]

    batches = build_rows(tokens, rows, pad_id, PACKED)

    assert len(batches) == len(rows)
    for batch, texts in zip(batches, rows, strict=True):
        assert batch.input_ids.shape == (1, 32)
        assert batch.members.shape == (1, 16)
        assert list(batch.segments) == list(range(1, 17))
        at = 0
        for number, text in enumerate(texts, start=1):
            n, start = lengths[text], int(tokens.offsets[text])
            assert list(batch.input_ids[0, at : at + n]) == list(tokens.ids[start : start + n])
            assert list(batch.position_ids[0, at : at + n]) == list(range(n))
            assert set(batch.segment_ids[0, at : at + n]) == {number}
            assert batch.members[0, number - 1] == text
            at += n
        assert set(batch.input_ids[0, at:]) <= {pad_id}
        assert not batch.segment_ids[0, at:].any()
        assert not batch.position_ids[0, at:].any()
        assert set(batch.members[0, len(texts) :]) <= {-1}


def test_shared_batch_stacks_the_packed_rows() -> None:
    tokens = ragged([5, 9, 3, 30, 2])
    rows = [[3, 4], [1, 0, 2]]

    shared = build_shared(tokens, rows, 7, 32)

    for row, packed in enumerate(build_rows(tokens, rows, 7, PACKED)):
        for name in ("input_ids", "position_ids", "segment_ids"):
            assert list(getattr(shared, name)[row]) == list(getattr(packed, name)[0]), name
    assert shared.members.tolist() == [[3, 4, -1], [1, 0, 2]]
    assert list(shared.segments) == [1, 2, 3]


@pytest.mark.parametrize(
    ("longest", "widths"),
    [
        (256, (64, 128, 256)),
        (512, (64, 128, 256, 512)),
        (300, (64, 128, 256, 304)),
        (64, (64,)),
        (20, (32,)),
    ],
)
def test_shared_widths_are_powers_of_two_up_to_the_longest_text(
    longest: int, widths: tuple[int, ...]
) -> None:
    assert RowSpec.shared(longest).widths == widths


def test_bucket_row_has_the_smallest_width_that_fits() -> None:
    row_spec = RowSpec.buckets(40)

    rows = build_rows(ragged([2, 16, 17, 32, 40]), [[0], [1], [2], [3], [4]], 0, row_spec)
    shapes = [row.input_ids.shape for row in rows]

    assert row_spec.widths == (16, 32, 40)
    assert shapes == [(1, 16), (1, 16), (1, 32), (1, 32), (1, 40)]


def test_packed_row_has_contiguous_int64_arrays() -> None:
    batch = build_rows(ragged([2, 3]), [[1, 0]], 0, PACKED)[0]

    for name in ("input_ids", "position_ids", "segment_ids", "segments", "members"):
        array = getattr(batch, name)
        assert array.dtype == np.int64, name
        assert array.flags.c_contiguous, name


def test_joined_tokens_hold_all_texts_in_order() -> None:
    joined = RaggedTokens.join([ragged([2, 3]), ragged([]), ragged([4])])

    assert list(joined.lengths) == [2, 3, 4]
    assert list(joined.ids) == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert len(RaggedTokens.join([])) == 0
