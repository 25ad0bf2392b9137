"""Batches are put together from checked values, and their vectors one after the other."""

import numpy as np
import pytest

from embedq.errors import CorruptValue
from embedq.jobs.batches import TextBatch, VectorBuffer, decode_result
from embedq.protocol.contract import Dtype, Outcome, Status, VectorSpec
from embedq.protocol.values import OutcomeTable, Vectors, encode, encode_failure

SPEC = VectorSpec("ab" * 32, 3, 256, dtype=Dtype.FLOAT16)


@pytest.mark.parametrize("planned", [None, 0, 1, 5, 9, 100])
def test_rows_stand_in_the_order_they_came(planned: int | None) -> None:
    """Whether as many come as were planned, more or fewer."""
    batches: list[Vectors] = [np.full((n, 3), n, np.float32) for n in (4, 1, 0, 3)]
    rows = VectorBuffer(SPEC, planned)
    for batch in batches:
        rows.append(batch)

    assert np.array_equal(rows.vectors(), np.concatenate(batches))
    assert rows.vectors().dtype == np.float16


def test_no_rows_have_the_dimension_of_the_spec() -> None:
    """An empty list of texts gives [0, D]."""
    assert VectorBuffer(SPEC, 0).vectors().shape == (0, 3)


PLAIN = VectorSpec("ab" * 32, 3, 256)


def value(n: int, *, dim: int = 3, dtype: Dtype = Dtype.FLOAT32, fill: float = 1) -> bytes:
    """Return a value of n rows, as a worker would store it."""
    rows: Vectors = np.full((n, dim), fill, np.float32)
    outcomes = OutcomeTable.from_outcomes([Outcome()] * n)
    return encode(rows, outcomes, PLAIN.fingerprint(), dtype)


def of_kinds(name: str) -> bytes:
    """Return a value of 200 rows, each with an outcome of its own kind."""
    outcomes = OutcomeTable.from_outcomes([Outcome(code=f"{name}{i}") for i in range(200)])
    return encode(np.ones((200, 3), np.float32), outcomes, PLAIN.fingerprint())


@pytest.mark.parametrize(
    "values",
    [
        (value(2), value(2, dim=4)),
        (value(4), encode_failure("code", "detail")),
        (value(2), value(2, dtype=Dtype.FLOAT16)),
        (value(4, dtype=Dtype.FLOAT16),),
        (value(4, fill=np.nan),),
        (value(2), value(2, fill=np.inf)),
        (value(3),),
        (value(2), value(3)),
        (of_kinds("a"), of_kinds("b")),
        (value(4), None),
        (),
    ],
    ids=[
        "dims",
        "failure",
        "types",
        "type",
        "nan",
        "inf",
        "fewer",
        "more",
        "kinds",
        "gone",
        "none",
    ],
)
def test_values_that_make_no_batch_are_corrupt(values: tuple[bytes | None, ...]) -> None:
    """Each is whole by itself, and not what was asked for: the batch is computed again."""
    n = 400 if values and len(values[0] or b"") > 1000 else 4
    piece = TextBatch(0, 0, ["text"] * n, {})

    with pytest.raises(CorruptValue):
        decode_result(piece, values, PLAIN, PLAIN.fingerprint())


def test_failed_text_needs_no_vector() -> None:
    """NaN is what a failed text has; those of the others are whole."""
    outcomes = [Outcome(), Outcome(status=Status.FAILED, code="set_aside")]
    rows = np.array([[1, 0, 0], [np.nan] * 3], np.float32)
    stored = encode(rows, OutcomeTable.from_outcomes(outcomes), PLAIN.fingerprint())

    batch = decode_result(TextBatch(0, 0, ["a", "b"], {}), [stored], PLAIN, PLAIN.fingerprint())

    assert batch.failures() == {1: "set_aside"}
