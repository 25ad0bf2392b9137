"""Plans hold every text once, waste little, and depend on nothing but the lengths."""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.models import docstrings, real_model

from embedq_worker.engines.base import SIMD_WIDTH, RowSpec
from embedq_worker.inference.planning import (
    CPU_CHUNKS,
    LONG_TAIL,
    MIN_BUDGET,
    NPU_CHUNKS,
    WORTH_SHARING,
    ChunkSchedule,
    Group,
    place_canary,
    plan_packed,
    plan_padded,
    plan_rows,
    plan_shared,
    plan_window,
)
from embedq_worker.inference.tokenizer import Tokenizer

LENGTHS = st.lists(st.integers(2, 300), max_size=200)
ROW = RowSpec.packed(256)
SHARED = RowSpec.shared(256)
FITTING = st.lists(st.integers(2, 256), max_size=300)


@given(LENGTHS, st.integers(1, 2048), st.integers(1, 4))
def test_plan_places_every_text_once(lengths: list[int], budget: int, streams: int) -> None:
    """The groups of a plan are a partition of the texts, whatever the lengths and the budget."""
    plan = plan_padded(lengths, budget, streams)

    placed = [int(index) for group in plan for index in group]
    assert sorted(placed) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 2048), st.integers(1, 4))
def test_plan_keeps_the_budget(lengths: list[int], budget: int, streams: int) -> None:
    """A group of several texts has at most `token_budget` padded tokens."""
    for group in plan_padded(lengths, budget, streams):
        longest = max(lengths[int(index)] for index in group)
        assert len(group) == 1 or longest * len(group) <= budget


@given(LENGTHS, st.integers(1, 2048), st.integers(1, 4))
def test_plan_goes_from_long_to_short(lengths: list[int], budget: int, streams: int) -> None:
    """The lengths never rise along a plan, so the smallest work comes last."""
    order = [lengths[int(i)] for group in plan_padded(lengths, budget, streams) for i in group]

    assert order == sorted(lengths, reverse=True)


def test_plan_is_deterministic_for_equal_lengths() -> None:
    """Texts of equal length keep their order: the plan depends on nothing but its arguments."""
    plan = plan_padded([5] * 10, 20)

    assert [list(map(int, group)) for group in plan] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_text_beyond_the_budget_goes_alone() -> None:
    """A text longer than the budget gets a group of its own and is not refused."""
    plan = plan_padded([600, 10, 700], 512)

    assert [list(map(int, group)) for group in plan] == [[2], [0], [1]]


def test_last_groups_shrink_for_streams() -> None:
    """With two streams the last group is small, so that neither waits long for the other."""
    lengths = [32] * 128

    shrunk = [len(group) * 32 for group in plan_padded(lengths, 1024, streams=2)]

    assert shrunk[0] == 1024
    assert shrunk[-1] <= MIN_BUDGET


def test_one_stream_shrinks_nothing() -> None:
    """With one stream every group but the last is as large as the budget allows."""
    sizes = [len(group) * 32 for group in plan_padded([32] * 128, 1024)]

    assert sizes == [1024] * 4


def test_plan_of_nothing_is_empty() -> None:
    """No texts give no groups."""
    assert plan_padded([], 512) == []


def is_shared(group: Group) -> bool:
    """Say whether some row of a group holds several texts."""
    return any(len(row) > 1 for row in group.rows)


@given(FITTING, st.integers(1, 2048), st.integers(1, 4))
def test_shared_plan_places_every_text_once(lengths: list[int], budget: int, streams: int) -> None:
    """The rows of all groups are a partition of the texts, and none is over-full."""
    plan = plan_shared(lengths, SHARED, budget, streams)

    rows = [row for group in plan for row in group.rows]
    assert sorted(int(i) for row in rows for i in row) == list(range(len(lengths)))
    for group in plan:
        assert all(sum(lengths[int(i)] for i in row) <= group.width for row in group.rows)


@given(FITTING, st.integers(1, 2048), st.integers(1, 4))
def test_shared_plan_keeps_the_budget(lengths: list[int], budget: int, streams: int) -> None:
    """A group of several rows keeps it, but for the tokens that fill up the lanes."""
    for group in plan_shared(lengths, SHARED, budget, streams):
        filled_up = 0 if is_shared(group) else SIMD_WIDTH - LONG_TAIL
        assert len(group.rows) == 1 or (group.width - filled_up) * len(group.rows) <= budget


@given(FITTING)
def test_texts_share_only_rows_that_they_fill(lengths: list[int]) -> None:
    """A row of several texts has one of the few widths, and little of it is padding."""
    for group in plan_shared(lengths, SHARED, 512):
        if is_shared(group):
            assert group.width in SHARED.widths
            tokens = [sum(lengths[int(i)] for i in row) for row in group.rows]
            assert min(tokens) >= WORTH_SHARING * group.width


def test_texts_that_fill_no_row_go_by_length() -> None:
    """Texts of 40 and 70 tokens leave too much of a row: each has one of its own, longest first."""
    plan = plan_shared([40] * 12 + [70] * 7, SHARED, 512)

    assert [(group.width, len(group.rows)) for group in plan] == [(70, 7), (40, 12)]


def test_plan_that_costs_less_is_taken() -> None:
    """Texts that fill a row whole share it; where a little is left over, rows of their own win."""
    assert all(map(is_shared, plan_shared([20, 12] * 32, SHARED, 512)))
    assert not any(map(is_shared, plan_shared([20] * 48, SHARED, 512)))


def test_long_tail_is_filled_up_and_a_short_one_is_not() -> None:
    """What a CPU would do number by number is padded where that costs less."""
    assert [group.width for group in plan_shared([SIMD_WIDTH * 4 - 1], SHARED, 512)] == [
        SIMD_WIDTH * 4
    ]
    assert [group.width for group in plan_shared([SIMD_WIDTH * 4 + 1], SHARED, 512)] == [
        SIMD_WIDTH * 4 + 1
    ]


def test_last_groups_of_shared_rows_shrink_for_streams() -> None:
    """Shared rows end in small groups as padded ones do."""
    plan = plan_shared([20, 12] * 128, SHARED, 1024, streams=2)

    sizes = [group.width * len(group.rows) for group in plan]
    assert is_shared(plan[0])
    assert sizes[0] == 1024
    assert sizes[-1] <= MIN_BUDGET


def test_shared_plan_of_nothing_is_empty() -> None:
    """No texts give no groups."""
    assert plan_shared([], SHARED, 512) == []


@pytest.mark.model
def test_prose_shares_rows_with_little_padding() -> None:
    """Of 512 docstrings in rows of 64, 128 and 256 tokens less than 2 % is padding."""
    model = real_model()
    texts = docstrings()[:512]
    lengths = Tokenizer(model.tokenizer_path, model.max_length).tokenize(texts).lengths

    plan = plan_shared(lengths, RowSpec.shared(model.max_length), 512)

    computed = sum(group.width * len(group.rows) for group in plan)
    assert sum(map(is_shared, plan)) > len(plan) / 2
    assert lengths.sum() >= 0.98 * computed


def rows_of_the_oracle(lengths: list[int], width: int) -> int:
    """Count the rows of best fit decreasing, written from its definition over a sorted list."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else width
        insort(rooms, room - length)
        count = len(rooms)
        assert count <= len(lengths)
    return len(rooms)


@given(FITTING)
def test_packed_plan_places_every_text_once(lengths: list[int]) -> None:
    """The rows are a partition of the texts: none is lost, none split."""
    plan = plan_packed(lengths, ROW)

    assert sorted(int(i) for row in plan for i in row) == list(range(len(lengths)))


@given(FITTING)
def test_packed_row_is_never_over_full(lengths: list[int]) -> None:
    """A row has at most its width in tokens, and no more texts than segments."""
    for row in plan_packed(lengths, ROW):
        assert sum(lengths[int(i)] for i in row) <= 256
        assert 1 <= len(row) <= ROW.segments(256)


@given(FITTING, st.integers(0, 3))
def test_packed_plan_needs_no_more_rows_than_best_fit_decreasing(
    lengths: list[int], extra: int
) -> None:
    """On any mix the number of rows is at most that of an independent best fit decreasing."""
    lengths = [*lengths, *lengths[: 10 * extra]]

    assert len(plan_packed(lengths, ROW)) <= rows_of_the_oracle(lengths, 256)


@given(st.lists(st.integers(0, 8), max_size=60))
def test_texts_of_one_token_and_none_find_rows(lengths: list[int]) -> None:
    """A tokenizer without special tokens may give them; then the segments of a row bind."""
    form = RowSpec.packed(8)

    plan = plan_packed(lengths, form)

    assert sorted(int(i) for row in plan for i in row) == list(range(len(lengths)))
    assert all(len(row) <= 4 for row in plan)


def test_text_longer_than_a_row_is_a_bug() -> None:
    """Texts are cut by the tokenizer; the plan refuses to split one."""
    with pytest.raises(ValueError, match="257 tokens"):
        plan_packed([3, 257], ROW)


@given(FITTING)
def test_packed_plan_is_the_same_twice(lengths: list[int]) -> None:
    """The plan of the same lengths is the same, row by row."""
    once, again = plan_packed(lengths, ROW), plan_packed(lengths, ROW)

    assert [list(row) for row in once] == [list(row) for row in again]


@given(st.lists(st.integers(2, 256), min_size=1, max_size=200), st.integers(2, 60))
def test_rider_costs_a_row_only_where_none_has_room(lengths: list[int], size: int) -> None:
    """The rider sits in the last row; there is a new row only if no other had room for it."""
    plan = plan_packed(lengths, ROW)
    rider = len(lengths)

    seated = place_canary(plan, [*lengths, size], ROW, rider)

    assert seated[-1][-1] == rider
    assert sorted(int(i) for row in seated for i in row) == list(range(rider + 1))
    room = 256 - min(sum(lengths[int(i)] for i in row) for row in plan)
    assert len(seated) == len(plan) + (room < size)


def test_rider_of_a_bucket_has_a_row_of_its_own() -> None:
    """A row of a bucket takes one text, so the canary comes last and alone."""
    form = RowSpec.buckets(64)
    plan = plan_rows([5, 20], form)

    seated = place_canary(plan, [5, 20, 9], form, 2)

    assert [list(row) for row in seated] == [[1], [0], [2]]


@pytest.mark.model
@pytest.mark.parametrize("n", [512, 1024, 2048])
def test_pad_share_on_docstrings(n: int) -> None:
    """With 512 docstrings or more, canary included, 2 % or less of what is computed is padding."""
    model = real_model()
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    lengths = tokenizer.tokenize(docstrings()[:n]).lengths

    plan = place_canary(plan_packed(lengths, ROW), np.append(lengths, 21), ROW, n)

    computed = 256 * len(plan)
    assert 1 - int(lengths.sum()) / computed <= 0.02


@given(
    st.integers(0, 5000),
    st.sampled_from(
        [NPU_CHUNKS, CPU_CHUNKS, ChunkSchedule(1, 1, 1, 1), ChunkSchedule(7, 3, 50, 5)]
    ),
)
def test_chunks_cover_every_text_once(n: int, pace: ChunkSchedule) -> None:
    """Chunks are never empty and add up, whatever the number of texts."""
    sizes = pace.sizes(n)

    assert sum(sizes) == n
    assert all(0 < size <= pace.most for size in sizes)


def test_fast_pace_begins_and_ends_small() -> None:
    """The engine waits for 32 texts at most, and at most 64 are left to encode at the end."""
    sizes = NPU_CHUNKS.sizes(4096)

    assert sizes[0] == 32
    assert sizes[-1] <= 64
    assert all(b <= 2 * a for a, b in pairwise(sizes))


def windows(lengths: list[int], sizes: list[int]) -> list[list[int]]:
    """Plan lengths window by window, as the embedder does; the indices are of the whole list."""
    rows: list[list[int]] = []
    waiting: list[int] = []
    at = 0
    for size in sizes:
        texts = [*waiting, *range(at, at + size)]
        at += size
        known = [lengths[text] for text in texts]
        found = plan_window(known, ROW, len(waiting), last=at == len(lengths))
        rows += [[texts[int(i)] for i in row] for row in found.rows]
        waiting = [texts[int(i)] for i in found.kept]
    assert not waiting
    return rows


@given(FITTING, st.integers(1, 40))
def test_windows_place_every_text_once(lengths: list[int], first: int) -> None:
    """Whatever waits for company goes with a later window, and the last leaves nobody."""
    rows = windows(lengths, ChunkSchedule(first, 2, 80, first).sizes(len(lengths)))

    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    assert all(sum(lengths[text] for text in row) <= 256 for row in rows)


@pytest.mark.model
def test_windows_waste_little_on_real_texts() -> None:
    """Rows that are planned before the batch is tokenized hold at most 2 % padding."""
    model = real_model()
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    lengths = tokenizer.tokenize(docstrings()).lengths.tolist()

    rows = windows(lengths, NPU_CHUNKS.sizes(len(lengths)))

    assert sum(lengths) / (256 * len(rows)) >= 0.98
