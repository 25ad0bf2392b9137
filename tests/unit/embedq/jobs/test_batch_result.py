"""Tests of assembling a batch result from stored values and of joining its vectors."""

import numpy as np
import pytest

from embedq.errors import CorruptValue
from embedq.jobs.batches import TextBatch, VectorBuffer, decode_result
from embedq.protocol.contract import Dtype, Outcome, Status, VectorSpec
from embedq.protocol.values import OutcomeTable, Vectors, encode, encode_failure

SPEC = VectorSpec("ab" * 32, 3, 256, dtype=Dtype.FLOAT16)


@pytest.mark.parametrize("planned", [None, 0, 1, 5, 9, 100])
def test_buffer_joins_batches_in_order_whatever_was_planned(planned: int | None) -> None:
    batches: list[Vectors] = [np.full((n, 3), n, np.float32) for n in (4, 1, 0, 3)]
    rows = VectorBuffer(SPEC, planned)
    for batch in batches:
        rows.append(batch)

    assert np.array_equal(rows.vectors(), np.concatenate(batches))
    assert rows.vectors().dtype == np.float16


def test_empty_buffer_has_the_dimension_of_the_spec() -> None:
    assert VectorBuffer(SPEC, 0).vectors().shape == (0, 3)


FLOAT32_SPEC = VectorSpec("ab" * 32, 3, 256)


def encoded_rows(n: int, *, dim: int = 3, dtype: Dtype = Dtype.FLOAT32, fill: float = 1) -> bytes:
    """Return the stored value of n equal rows."""
    rows: Vectors = np.full((n, dim), fill, np.float32)
    outcomes = OutcomeTable.from_outcomes([Outcome()] * n)
    return encode(rows, outcomes, FLOAT32_SPEC.fingerprint(), dtype)


def encoded_rows_of_many_kinds(name: str) -> bytes:
    """Return the stored value of 200 rows with 200 different outcomes."""
    outcomes = OutcomeTable.from_outcomes([Outcome(code=f"{name}{i}") for i in range(200)])
    return encode(np.ones((200, 3), np.float32), outcomes, FLOAT32_SPEC.fingerprint())


@pytest.mark.parametrize(
    "values",
    [
        (encoded_rows(2), encoded_rows(2, dim=4)),
        (encoded_rows(4), encode_failure("code", "detail")),
        (encoded_rows(2), encoded_rows(2, dtype=Dtype.FLOAT16)),
        (encoded_rows(4, dtype=Dtype.FLOAT16),),
        (encoded_rows(4, fill=np.nan),),
        (encoded_rows(2), encoded_rows(2, fill=np.inf)),
        (encoded_rows(3),),
        (encoded_rows(2), encoded_rows(3)),
        (encoded_rows_of_many_kinds("a"), encoded_rows_of_many_kinds("b")),
        (encoded_rows(4), None),
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
        "expired",
        "none",
    ],
)
def test_values_that_do_not_match_the_batch_are_corrupt(values: tuple[bytes | None, ...]) -> None:
    n = 400 if values and len(values[0] or b"") > 1000 else 4
    text_batch = TextBatch(0, 0, ["text"] * n, {})

    with pytest.raises(CorruptValue):
        decode_result(text_batch, values, FLOAT32_SPEC, FLOAT32_SPEC.fingerprint())


def test_failed_text_may_have_a_nan_vector() -> None:
    outcomes = [Outcome(), Outcome(status=Status.FAILED, code="set_aside")]
    rows = np.array([[1, 0, 0], [np.nan] * 3], np.float32)
    stored = encode(rows, OutcomeTable.from_outcomes(outcomes), FLOAT32_SPEC.fingerprint())

    batch = decode_result(
        TextBatch(0, 0, ["a", "b"], {}), [stored], FLOAT32_SPEC, FLOAT32_SPEC.fingerprint()
    )

    assert batch.failures() == {1: "set_aside"}
