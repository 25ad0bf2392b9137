"""Texts lie in token batches where the plan put them, in the types of the graph."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq_worker.engines.base import RaggedTokens, RowSpec
from embedq_worker.inference.packing import build_padded, build_rows, build_shared
from embedq_worker.inference.planning import plan_packed


def ragged(lengths: list[int]) -> RaggedTokens:
    """Make tokens that count up from 1, so that each is recognisable."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return RaggedTokens(ids, offsets, np.zeros(len(lengths), np.uint32))


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.randoms())
def test_build_padded_places_the_tokens(lengths: list[int], random: object) -> None:
    """Each row holds the tokens of its text, then padding; positions count from 0."""
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


def test_build_padded_has_the_types_of_the_graph() -> None:
    """All arrays are contiguous int64, as the inputs of the graph are declared."""
    batch = build_padded(ragged([2, 3]), [1, 0], pad_id=0)

    for name in ("input_ids", "position_ids", "segment_ids", "segments", "members"):
        array = getattr(batch, name)
        assert array.dtype == np.int64, name
        assert array.flags.c_contiguous, name
    assert list(batch.segments) == [1]


PACKED = RowSpec.packed(32)


@given(st.lists(st.integers(2, 32), max_size=60), st.integers(1, 9))
def test_packed_rows_hold_their_texts_one_after_the_other(lengths: list[int], skip: int) -> None:
    """Each segment has the tokens of its text, positions from 0 and a number of its own."""
    tokens = ragged(lengths)
    rows = [list(row) for row in plan_packed(lengths, PACKED)]

    batches = build_rows(tokens, rows, skip, PACKED)

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
        assert set(batch.input_ids[0, at:]) <= {skip}
        assert not batch.segment_ids[0, at:].any()
        assert not batch.position_ids[0, at:].any()
        assert set(batch.members[0, len(texts) :]) <= {-1}


def test_shared_rows_are_the_packed_ones_side_by_side() -> None:
    """One token batch of several rows has what the same rows have alone, with fewer segments."""
    tokens = ragged([5, 9, 3, 30, 2])
    rows = [[3, 4], [1, 0, 2]]

    shared = build_shared(tokens, rows, 7, 32)

    for row, alone in enumerate(build_rows(tokens, rows, 7, PACKED)):
        for name in ("input_ids", "position_ids", "segment_ids"):
            assert list(getattr(shared, name)[row]) == list(getattr(alone, name)[0]), name
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
def test_shared_rows_take_the_longest_text(longest: int, widths: tuple[int, ...]) -> None:
    """Widths are powers of two, and the last takes the longest text in whole lanes."""
    assert RowSpec.shared(longest).widths == widths


def test_row_of_a_bucket_is_as_wide_as_the_smallest_that_fits() -> None:
    """One text of 17 tokens lies in a row of 32, and one of 40 in the widest."""
    form = RowSpec.buckets(40)

    rows = build_rows(ragged([2, 16, 17, 32, 40]), [[0], [1], [2], [3], [4]], 0, form)
    shapes = [row.input_ids.shape for row in rows]

    assert form.widths == (16, 32, 40)
    assert shapes == [(1, 16), (1, 16), (1, 32), (1, 32), (1, 40)]


def test_packed_row_has_the_types_of_the_graph() -> None:
    """All arrays of a row are contiguous int64."""
    batch = build_rows(ragged([2, 3]), [[1, 0]], 0, PACKED)[0]

    for name in ("input_ids", "position_ids", "segment_ids", "segments", "members"):
        array = getattr(batch, name)
        assert array.dtype == np.int64, name
        assert array.flags.c_contiguous, name


def test_joined_tokens_keep_their_texts() -> None:
    """Two parts put together hold the texts of the first, then those of the second."""
    joined = RaggedTokens.join([ragged([2, 3]), ragged([]), ragged([4])])

    assert list(joined.lengths) == [2, 3, 4]
    assert list(joined.ids) == [1, 2, 3, 4, 5, 1, 2, 3, 4]
    assert len(RaggedTokens.join([])) == 0
