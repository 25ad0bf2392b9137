"""Tests of the Redis value that holds the vectors and outcomes of a batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.errors import CorruptValue
from embedq.protocol.contract import Code, Outcome, Status
from embedq.protocol.values import (
    MAX_VALUE_BYTES,
    OutcomeTable,
    Vectors,
    decode,
    encode,
    encode_failure,
    split_rows,
)

FINGERPRINT = b"12345678"
OK = Outcome(device="cpu", precision="f32", n_tokens=7)
FAILED = Outcome(status=Status.FAILED, code=Code.NUL_CHARACTER)


def sample(rows: int = 3, dim: int = 8) -> tuple[Vectors, OutcomeTable]:
    """Return vectors with one failed row, and their outcomes."""
    vectors = np.random.default_rng(1).standard_normal((rows, dim)).astype(np.float32)
    outcomes = [OK] * rows
    if rows:
        vectors[-1], outcomes[-1] = np.nan, FAILED
    return vectors, OutcomeTable.from_outcomes(outcomes)


@pytest.mark.parametrize(("rows", "dim"), [(0, 384), (1, 1), (3, 8), (170, 384), (2, 4096)])
def test_rows_and_outcomes_survive_encoding(rows: int, dim: int) -> None:
    vectors, outcomes = sample(rows, dim)

    value = decode(encode(vectors, outcomes, FINGERPRINT), FINGERPRINT)

    assert value.vectors.tobytes() == vectors.tobytes()
    assert value.vectors.shape == (rows, dim)
    assert list(value.outcomes) == list(outcomes)
    assert value.failure is None


def test_strided_view_is_encoded_as_its_own_rows() -> None:
    vectors, outcomes = sample(6)

    value = decode(encode(vectors[::2], outcomes.rows(0, 3), FINGERPRINT), FINGERPRINT)

    assert np.array_equal(value.vectors, vectors[::2], equal_nan=True)


def test_failure_is_decoded_with_any_fingerprint() -> None:
    value = decode(encode_failure("wrong_model", "Not this one.\nReally."), FINGERPRINT)

    assert value.failure == ("wrong_model", "Not this one.\nReally.")
    assert len(value.outcomes) == 0


def test_long_failure_reason_is_truncated() -> None:
    stored = encode_failure("code", "é" * 100_000)

    assert len(stored) < 5_000
    failure = decode(stored, FINGERPRINT).failure
    assert failure is not None
    assert failure[0] == "code"


def test_any_changed_byte_is_detected() -> None:
    stored = encode(*sample(), FINGERPRINT)

    for place in range(len(stored)):
        tampered = bytearray(stored)
        tampered[place] ^= 0x10
        with pytest.raises(CorruptValue):
            decode(bytes(tampered), FINGERPRINT)


@given(st.binary(max_size=200))
def test_garbage_raises_only_corrupt_value(garbage: bytes) -> None:
    with pytest.raises(CorruptValue):
        decode(garbage, FINGERPRINT)


def test_truncated_or_extended_value_is_corrupt() -> None:
    stored = encode(*sample(), FINGERPRINT)

    for tampered in (stored[:-1], stored[:31], stored + b"\0", b""):
        with pytest.raises(CorruptValue):
            decode(tampered, FINGERPRINT)


def test_value_of_another_specification_is_refused() -> None:
    stored = encode(*sample(), FINGERPRINT)

    with pytest.raises(CorruptValue, match=r"3132333435363738, expected 3837363534333231"):
        decode(stored, FINGERPRINT[::-1])


@given(st.integers(0, 5_000), st.integers(1, 4_096))
def test_pieces_cover_all_rows_within_256_kib(rows: int, dim: int) -> None:
    pieces = list(split_rows(rows, dim))

    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces)][: len(pieces)]
    assert (pieces[-1][1] if pieces else 0) == rows
    assert all(start < stop for start, stop in pieces)
    assert max((stop - start) * (4 * dim + 10) for start, stop in pieces or [(0, 0)]) <= (
        MAX_VALUE_BYTES
    )


@pytest.mark.parametrize("rows", [1, 17, 128, 341, 1024, 4096])
def test_value_with_many_kinds_of_outcomes_fits_into_256_kib(rows: int) -> None:
    vectors = np.zeros((rows, 384), np.float32)
    kinds = [FAILED, OK, *(Outcome(status=Status.FAILED, code=str(code)) for code in Code)]
    outcomes = OutcomeTable.from_outcomes([kinds[row % len(kinds)] for row in range(rows)])

    sizes = [
        len(encode(vectors[start:stop], outcomes.rows(start, stop), FINGERPRINT))
        for start, stop in split_rows(rows, 384)
    ]

    assert max(sizes) <= MAX_VALUE_BYTES
