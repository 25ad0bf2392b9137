"""Outcomes by column: the same texts, a few bytes each."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.errors import CorruptValue
from embedq.protocol.contract import Code, Device, Outcome, Precision, Status
from embedq.protocol.values import OutcomeTable

outcomes = st.builds(
    Outcome,
    status=st.sampled_from(Status),
    truncated=st.booleans(),
    rerouted=st.booleans(),
    n_tokens=st.integers(0, 2**32 - 1),
    n_tokens_dropped=st.integers(0, 2**32 - 1),
    device=st.sampled_from([str(device) for device in Device]),
    precision=st.sampled_from([str(precision) for precision in Precision]),
    code=st.sampled_from([str(code) for code in Code]),
)
lists = st.lists(outcomes, max_size=30)


@given(lists)
def test_outcomes_come_back(some: list[Outcome]) -> None:
    """Every field of every outcome survives the bytes."""
    table = OutcomeTable.from_bytes(OutcomeTable.from_outcomes(some).to_bytes(), len(some))

    assert list(table) == some


@given(st.lists(lists, min_size=1, max_size=5))
def test_joined_tables_hold_all_rows_in_order(parts: list[list[Outcome]]) -> None:
    """Joining renumbers what each table calls its kinds."""
    joined = OutcomeTable.concatenate([OutcomeTable.from_outcomes(part) for part in parts])

    assert list(joined) == [outcome for part in parts for outcome in part]


@given(lists, st.integers(0, 30), st.integers(0, 30))
def test_rows_are_a_part(some: list[Outcome], start: int, stop: int) -> None:
    """A run of rows has their outcomes."""
    assert list(OutcomeTable.from_outcomes(some).rows(start, stop)) == some[start:stop]


@given(st.binary(max_size=100), st.integers(0, 20))
def test_garbage_is_read_or_corrupt(raw: bytes, n: int) -> None:
    """Bytes that hold no n outcomes raise nothing but CorruptValue."""
    try:
        table = OutcomeTable.from_bytes(raw, n)
    except CorruptValue:
        return
    assert len(table) == n


def test_cut_table_is_corrupt() -> None:
    """A table of fewer rows than asked for is refused."""
    raw = OutcomeTable.from_outcomes([Outcome()] * 5).to_bytes()

    with pytest.raises(CorruptValue):
        OutcomeTable.from_bytes(raw[:-1], 5)


def test_a_thousand_texts_cost_ten_bytes_each() -> None:
    """The price of an outcome is ten bytes, whatever it says."""
    raw = OutcomeTable.from_outcomes([Outcome(device="cpu", precision="f32")] * 1000).to_bytes()

    assert len(raw) < 10 * 1000 + 64
