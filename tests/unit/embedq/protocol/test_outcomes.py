"""Tests of the table that stores outcomes by column."""

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
outcome_lists = st.lists(outcomes, max_size=30)


@given(outcome_lists)
def test_outcomes_survive_encoding(expected: list[Outcome]) -> None:
    table = OutcomeTable.from_bytes(OutcomeTable.from_outcomes(expected).to_bytes(), len(expected))

    assert list(table) == expected


@given(st.lists(outcome_lists, min_size=1, max_size=5))
def test_concatenated_tables_hold_all_rows_in_order(parts: list[list[Outcome]]) -> None:
    joined = OutcomeTable.concatenate([OutcomeTable.from_outcomes(part) for part in parts])

    assert list(joined) == [outcome for part in parts for outcome in part]


@given(outcome_lists, st.integers(0, 30), st.integers(0, 30))
def test_slice_of_a_table_has_the_same_outcomes(
    expected: list[Outcome], start: int, stop: int
) -> None:
    assert list(OutcomeTable.from_outcomes(expected).rows(start, stop)) == expected[start:stop]


@given(st.binary(max_size=100), st.integers(0, 20))
def test_garbage_is_parsed_or_corrupt(raw: bytes, n: int) -> None:
    try:
        table = OutcomeTable.from_bytes(raw, n)
    except CorruptValue:
        return
    assert len(table) == n


def test_truncated_table_is_corrupt() -> None:
    raw = OutcomeTable.from_outcomes([Outcome()] * 5).to_bytes()

    with pytest.raises(CorruptValue):
        OutcomeTable.from_bytes(raw[:-1], 5)


def test_outcome_takes_ten_bytes() -> None:
    raw = OutcomeTable.from_outcomes([Outcome(device="cpu", precision="f32")] * 1000).to_bytes()

    assert len(raw) < 10 * 1000 + 64
