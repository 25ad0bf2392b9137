"""Ragged tokens become token batches that hold every text once, within the budget."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedq_worker.packing import MIN_BUDGET, build_padded, plan_padded
from embedq_worker.tokens import RaggedTokens

LENGTHS = st.lists(st.integers(2, 300), max_size=200)


def ragged(lengths: list[int]) -> RaggedTokens:
    """Make tokens that count up from 1, so that each is recognisable."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = np.arange(1, offsets[-1] + 1, dtype=np.int32)
    return RaggedTokens(ids, offsets, np.zeros(len(lengths), np.uint32))


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
