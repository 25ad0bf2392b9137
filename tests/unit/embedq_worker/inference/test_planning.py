"""Tests of assigning texts to padded, shared and packed rows and to chunks."""

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
def test_padded_plan_places_every_text_once(lengths: list[int], budget: int, streams: int) -> None:
    plan = plan_padded(lengths, budget, streams)

    placed = [int(index) for group in plan for index in group]
    assert sorted(placed) == list(range(len(lengths)))


@given(LENGTHS, st.integers(1, 2048), st.integers(1, 4))
def test_padded_group_of_several_texts_is_within_the_budget(
    lengths: list[int], budget: int, streams: int
) -> None:
    for group in plan_padded(lengths, budget, streams):
        longest = max(lengths[int(index)] for index in group)
        assert len(group) == 1 or longest * len(group) <= budget


@given(LENGTHS, st.integers(1, 2048), st.integers(1, 4))
def test_padded_plan_is_ordered_by_falling_length(
    lengths: list[int], budget: int, streams: int
) -> None:
    order = [lengths[int(i)] for group in plan_padded(lengths, budget, streams) for i in group]

    assert order == sorted(lengths, reverse=True)


def test_texts_of_equal_length_are_planned_in_order() -> None:
    plan = plan_padded([5] * 10, 20)

    assert [list(map(int, group)) for group in plan] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_text_over_the_budget_has_a_group_of_its_own() -> None:
    plan = plan_padded([600, 10, 700], 512)

    assert [list(map(int, group)) for group in plan] == [[2], [0], [1]]


def test_last_padded_groups_are_small_for_several_streams() -> None:
    lengths = [32] * 128

    shrunk = [len(group) * 32 for group in plan_padded(lengths, 1024, streams=2)]

    assert shrunk[0] == 1024
    assert shrunk[-1] <= MIN_BUDGET


def test_groups_for_one_stream_are_full() -> None:
    sizes = [len(group) * 32 for group in plan_padded([32] * 128, 1024)]

    assert sizes == [1024] * 4


def test_padded_plan_without_texts_is_empty() -> None:
    assert plan_padded([], 512) == []


def has_shared_row(group: Group) -> bool:
    return any(len(row) > 1 for row in group.rows)


@given(FITTING, st.integers(1, 2048), st.integers(1, 4))
def test_shared_plan_places_every_text_once(lengths: list[int], budget: int, streams: int) -> None:
    plan = plan_shared(lengths, SHARED, budget, streams)

    rows = [row for group in plan for row in group.rows]
    assert sorted(int(i) for row in rows for i in row) == list(range(len(lengths)))
    for group in plan:
        assert all(sum(lengths[int(i)] for i in row) <= group.width for row in group.rows)


@given(FITTING, st.integers(1, 2048), st.integers(1, 4))
def test_shared_group_of_several_rows_is_within_the_budget(
    lengths: list[int], budget: int, streams: int
) -> None:
    for group in plan_shared(lengths, SHARED, budget, streams):
        filled_up = 0 if has_shared_row(group) else SIMD_WIDTH - LONG_TAIL
        assert len(group.rows) == 1 or (group.width - filled_up) * len(group.rows) <= budget


@given(FITTING)
def test_shared_row_has_a_standard_width_and_little_padding(lengths: list[int]) -> None:
    for group in plan_shared(lengths, SHARED, 512):
        if has_shared_row(group):
            assert group.width in SHARED.widths
            tokens = [sum(lengths[int(i)] for i in row) for row in group.rows]
            assert min(tokens) >= WORTH_SHARING * group.width


def test_texts_that_fill_no_row_have_rows_of_their_own_by_length() -> None:
    plan = plan_shared([40] * 12 + [70] * 7, SHARED, 512)

    assert [(group.width, len(group.rows)) for group in plan] == [(70, 7), (40, 12)]


def test_rows_are_shared_only_if_that_costs_less() -> None:
    assert all(map(has_shared_row, plan_shared([20, 12] * 32, SHARED, 512)))
    assert not any(map(has_shared_row, plan_shared([20] * 48, SHARED, 512)))


def test_row_width_is_rounded_up_to_simd_width_only_for_a_long_tail() -> None:
    assert [group.width for group in plan_shared([SIMD_WIDTH * 4 - 1], SHARED, 512)] == [
        SIMD_WIDTH * 4
    ]
    assert [group.width for group in plan_shared([SIMD_WIDTH * 4 + 1], SHARED, 512)] == [
        SIMD_WIDTH * 4 + 1
    ]


def test_last_shared_groups_are_small_for_several_streams() -> None:
    plan = plan_shared([20, 12] * 128, SHARED, 1024, streams=2)

    sizes = [group.width * len(group.rows) for group in plan]
    assert has_shared_row(plan[0])
    assert sizes[0] == 1024
    assert sizes[-1] <= MIN_BUDGET


def test_shared_plan_without_texts_is_empty() -> None:
    assert plan_shared([], SHARED, 512) == []


@pytest.mark.model
def test_shared_rows_of_512_docstrings_are_less_than_2_percent_padding() -> None:
    model = real_model()
    texts = docstrings()[:512]
    lengths = Tokenizer(model.tokenizer_path, model.max_length).tokenize(texts).lengths

    plan = plan_shared(lengths, RowSpec.shared(model.max_length), 512)

    computed = sum(group.width * len(group.rows) for group in plan)
    assert sum(map(has_shared_row, plan)) > len(plan) / 2
    assert lengths.sum() >= 0.98 * computed


def best_fit_decreasing_rows(lengths: list[int], width: int) -> int:
    """Return the number of rows of best fit decreasing, implemented with a sorted list."""
    free_spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = bisect_left(free_spaces, length)
        free = free_spaces.pop(at) if at < len(free_spaces) else width
        insort(free_spaces, free - length)
        count = len(free_spaces)
        assert count <= len(lengths)
    return len(free_spaces)


@given(FITTING)
def test_packed_plan_places_every_text_once(lengths: list[int]) -> None:
    plan = plan_packed(lengths, ROW)

    assert sorted(int(i) for row in plan for i in row) == list(range(len(lengths)))


@given(FITTING)
def test_packed_row_is_within_width_and_segments(lengths: list[int]) -> None:
    for row in plan_packed(lengths, ROW):
        assert sum(lengths[int(i)] for i in row) <= 256
        assert 1 <= len(row) <= ROW.segments(256)


@given(FITTING, st.integers(0, 3))
def test_packed_plan_has_at_most_the_rows_of_best_fit_decreasing(
    lengths: list[int], extra: int
) -> None:
    lengths = [*lengths, *lengths[: 10 * extra]]

    assert len(plan_packed(lengths, ROW)) <= best_fit_decreasing_rows(lengths, 256)


@given(st.lists(st.integers(0, 8), max_size=60))
def test_texts_of_one_or_no_token_are_limited_by_segments(lengths: list[int]) -> None:
    row_spec = RowSpec.packed(8)

    plan = plan_packed(lengths, row_spec)

    assert sorted(int(i) for row in plan for i in row) == list(range(len(lengths)))
    assert all(len(row) <= 4 for row in plan)


def test_text_longer_than_a_row_raises_value_error() -> None:
    with pytest.raises(ValueError, match="257 tokens"):
        plan_packed([3, 257], ROW)


@given(FITTING)
def test_packed_plan_is_deterministic(lengths: list[int]) -> None:
    once, again = plan_packed(lengths, ROW), plan_packed(lengths, ROW)

    assert [list(row) for row in once] == [list(row) for row in again]


@given(st.lists(st.integers(2, 256), min_size=1, max_size=200), st.integers(2, 60))
def test_canary_is_placed_last_and_adds_a_row_only_if_none_has_space(
    lengths: list[int], size: int
) -> None:
    plan = plan_packed(lengths, ROW)
    canary = len(lengths)

    placed = place_canary(plan, [*lengths, size], ROW, canary)

    assert placed[-1][-1] == canary
    assert sorted(int(i) for row in placed for i in row) == list(range(canary + 1))
    free = 256 - min(sum(lengths[int(i)] for i in row) for row in plan)
    assert len(placed) == len(plan) + (free < size)


def test_canary_in_buckets_has_a_row_of_its_own() -> None:
    row_spec = RowSpec.buckets(64)
    plan = plan_rows([5, 20], row_spec)

    placed = place_canary(plan, [5, 20, 9], row_spec, 2)

    assert [list(row) for row in placed] == [[1], [0], [2]]


@pytest.mark.model
@pytest.mark.parametrize("n", [512, 1024, 2048])
def test_packed_rows_of_docstrings_are_at_most_2_percent_padding(n: int) -> None:
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
def test_chunks_cover_every_text_once(n: int, schedule: ChunkSchedule) -> None:
    sizes = schedule.sizes(n)

    assert sum(sizes) == n
    assert all(0 < size <= schedule.max_size for size in sizes)


def test_npu_chunks_start_with_32_texts_and_end_with_at_most_64() -> None:
    sizes = NPU_CHUNKS.sizes(4096)

    assert sizes[0] == 32
    assert sizes[-1] <= 64
    assert all(b <= 2 * a for a, b in pairwise(sizes))


def plan_in_windows(lengths: list[int], sizes: list[int]) -> list[list[int]]:
    """Plan rows window by window as the embedder does; indices refer to all lengths."""
    rows: list[list[int]] = []
    waiting: list[int] = []
    at = 0
    for size in sizes:
        texts = [*waiting, *range(at, at + size)]
        at += size
        known = [lengths[text] for text in texts]
        found = plan_window(known, ROW, len(waiting), last=at == len(lengths))
        rows += [[texts[int(i)] for i in row] for row in found.rows]
        waiting = [texts[int(i)] for i in found.deferred]
    assert not waiting
    return rows


@given(FITTING, st.integers(1, 40))
def test_windows_place_every_text_once(lengths: list[int], first: int) -> None:
    rows = plan_in_windows(lengths, ChunkSchedule(first, 2, 80, first).sizes(len(lengths)))

    assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
    assert all(sum(lengths[text] for text in row) <= 256 for row in rows)


@pytest.mark.model
def test_rows_planned_in_windows_are_at_most_2_percent_padding() -> None:
    model = real_model()
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    lengths = tokenizer.tokenize(docstrings()).lengths.tolist()

    rows = plan_in_windows(lengths, NPU_CHUNKS.sizes(len(lengths)))

    assert sum(lengths) / (256 * len(rows)) >= 0.98
