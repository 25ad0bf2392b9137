"""One text in many batches is computed twice; a device that drifts is found before the commit."""

from __future__ import annotations

import numpy as np
import pytest

from embedq.protocol.contract import Accuracy, Device, OnLong, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.testing import STUB_DIM, stub_vectors
from embedq_worker.engines.stub import STUB_IDENTITY, StubEngine, StubTokenizer
from embedq_worker.errors import CompileFailed, EngineError, FailureReason, ModelError
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.serving import VerifiedEngine
from embedq_worker.inference.verifier import ShadowCheck

TEXTS = ["one", "two", "three"]
BATCH = EmbedBatch(
    "job",
    0,
    TEXTS,
    VectorSpec(STUB_IDENTITY, STUB_DIM, 256, "", OnLong.TRUNCATE, Accuracy.STANDARD),
)


def reference() -> VerifiedEngine:
    """Open what is trusted."""
    engine = StubEngine(device=Device.CPU)
    embedder = Embedder(StubTokenizer(), engine, token_budget=512)
    return VerifiedEngine(engine, embedder, selftest.run(embedder, None), "only")


def test_right_vectors_pass() -> None:
    """Every text of a sound device agrees with its shadow."""
    shadow = ShadowCheck(1, reference)

    for _ in range(10):
        shadow.check(BATCH, stub_vectors(TEXTS))
    shadow.close()


@pytest.mark.parametrize(
    "wrong", [np.roll(stub_vectors(TEXTS), 1, axis=1), stub_vectors(TEXTS)[::-1]]
)
def test_device_whose_vectors_drift_is_found(
    wrong: np.ndarray[tuple[int, int], np.dtype[np.float32]],
) -> None:
    """Vectors of other texts, or of none, are outside the class, whichever text is looked at."""
    shadow = ShadowCheck(1, reference)
    middle_apart = np.array(wrong)
    middle_apart[1] = -middle_apart[1]

    with pytest.raises(EngineError) as found:
        shadow.check(BATCH, middle_apart)
    shadow.close()

    assert found.value.reason is FailureReason.SHADOW_MISMATCH


def test_only_the_nth_batch_is_checked() -> None:
    """The others cost nothing."""
    opened = []
    shadow = ShadowCheck(3, lambda: opened.append(1) or reference())  # type: ignore[func-returns-value] # append's None

    counts = []
    for _ in range(6):
        shadow.check(BATCH, stub_vectors(TEXTS))
        counts.append(len(opened))
    shadow.close()

    assert counts == [0, 0, 1, 1, 1, 1]


def test_batch_without_a_vector_is_left_alone() -> None:
    """There is nothing to compare where every text was refused."""
    ShadowCheck(1, reference).check(BATCH, np.full((3, STUB_DIM), np.nan, np.float32))


@pytest.mark.parametrize(
    "error",
    [CompileFailed("No.", FailureReason.COMPILE_REFUSED), ModelError("The file is gone.")],
    ids=["engine", "model"],
)
def test_shadow_that_does_not_open_is_no_sign_against_the_device(error: Exception) -> None:
    """The job goes on without it; the log says so."""

    def refuse() -> VerifiedEngine:
        raise error

    ShadowCheck(1, refuse).check(BATCH, stub_vectors(TEXTS))
