"""Tests of the check of the canary's vector."""

from __future__ import annotations

import numpy as np
import pytest

from embedq.testing import stub_vectors
from embedq_worker.engines.stub import StubTokenizer
from embedq_worker.errors import FailureReason, InferFailed
from embedq_worker.inference.embedder import CANARY_TEXT, Canary


@pytest.mark.parametrize("length", [1e30, 3e38])
def test_vector_whose_product_overflows_is_wrong(length: float) -> None:
    vector = stub_vectors([CANARY_TEXT])[0]
    canary = Canary(StubTokenizer().tokenize([CANARY_TEXT]), vector)

    with pytest.raises(InferFailed) as caught:
        canary.check(np.sign(vector) * np.float32(length))

    assert caught.value.reason is FailureReason.WRONG_CANARY
