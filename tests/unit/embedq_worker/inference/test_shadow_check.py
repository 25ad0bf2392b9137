"""Tests of the shadow check that recomputes one vector in a reference engine."""

from __future__ import annotations

import numpy as np
import pytest
from tests.support.stub_batches import stub_batch

from embedq.protocol.contract import Device
from embedq.testing import STUB_DIM, stub_vectors
from embedq_worker.engines.stub import StubEngine, StubTokenizer
from embedq_worker.errors import CompileFailed, EngineError, FailureReason, ModelError
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.serving import VerifiedEngine
from embedq_worker.inference.verifier import ShadowCheck

TEXTS = ["one", "two", "three"]
BATCH = stub_batch(TEXTS)


def reference() -> VerifiedEngine:
    engine = StubEngine(device=Device.CPU)
    embedder = Embedder(StubTokenizer(), engine, token_budget=512)
    return VerifiedEngine(engine, embedder, selftest.run(embedder, None), "only")


def test_correct_vectors_pass() -> None:
    shadow = ShadowCheck(1, reference)

    for _ in range(10):
        shadow.check(BATCH, stub_vectors(TEXTS))
    shadow.close()


@pytest.mark.parametrize(
    "wrong", [np.roll(stub_vectors(TEXTS), 1, axis=1), stub_vectors(TEXTS)[::-1]]
)
def test_vectors_of_other_texts_fail(
    wrong: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> None:
    shadow = ShadowCheck(1, reference)
    all_wrong = np.array(wrong)
    all_wrong[1] = -all_wrong[1]

    with pytest.raises(EngineError) as caught:
        shadow.check(BATCH, all_wrong)
    shadow.close()

    assert caught.value.reason is FailureReason.SHADOW_MISMATCH


def test_only_every_nth_batch_is_checked() -> None:
    opened = []
    shadow = ShadowCheck(3, lambda: opened.append(1) or reference())  # type: ignore[func-returns-value] # append's None

    counts = []
    for _ in range(6):
        shadow.check(BATCH, stub_vectors(TEXTS))
        counts.append(len(opened))
    shadow.close()

    assert counts == [0, 0, 1, 1, 1, 1]


def test_batch_without_vectors_is_not_checked() -> None:
    ShadowCheck(1, reference).check(BATCH, np.full((3, STUB_DIM), np.nan, np.float32))


@pytest.mark.parametrize(
    "error",
    [CompileFailed("No.", FailureReason.COMPILE_REFUSED), ModelError("The file is gone.")],
    ids=["engine", "model"],
)
def test_reference_that_does_not_open_does_not_fail_the_batch(error: Exception) -> None:
    def refuse() -> VerifiedEngine:
        raise error

    ShadowCheck(1, refuse).check(BATCH, stub_vectors(TEXTS))
