"""Vectors of a job are put one after the other as they come."""

import numpy as np
import pytest

from embedq.contract import Dtype, VectorSpec
from embedq.finished import Rows
from embedq.vectors import Vectors

SPEC = VectorSpec("ab" * 32, 3, 256, dtype=Dtype.FLOAT16)


@pytest.mark.parametrize("planned", [None, 0, 1, 5, 9, 100])
def test_rows_stand_in_the_order_they_came(planned: int | None) -> None:
    """Whether as many come as were planned, more or fewer."""
    batches: list[Vectors] = [np.full((n, 3), n, np.float32) for n in (4, 1, 0, 3)]
    rows = Rows(SPEC, planned)
    for batch in batches:
        rows.append(batch)

    assert np.array_equal(rows.vectors(), np.concatenate(batches))
    assert rows.vectors().dtype == np.float16


def test_no_rows_have_the_dimension_of_the_spec() -> None:
    """An empty list of texts gives [0, D]."""
    assert Rows(SPEC, 0).vectors().shape == (0, 3)
