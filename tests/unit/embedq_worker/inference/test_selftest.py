"""Tests that the self-test accepts correct engines and reports the fault of wrong ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.models import real_model, tiny_model

from embedq.protocol.contract import Accuracy, Precision
from embedq.testing import stub_vectors
from embedq_worker.engines.base import RowSpec, TokenBatch
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.engines.stub import StubEngine, StubTokenizer
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selftest import GOLDEN, PUBLISHED, Report
from embedq_worker.inference.tokenizer import Tokenizer


class AlteredStub(StubEngine):
    """Stub whose vectors are changed by a function."""

    def __init__(self, change: object) -> None:
        super().__init__()
        self._change = change

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        vectors = super().infer(batch)
        self._change(batch, vectors)  # type: ignore[operator]
        return vectors


def run(
    engine: StubEngine,
    reference: npt.NDArray[np.float32] | None = None,
    accuracy: Accuracy = Accuracy.STANDARD,
    row_spec: RowSpec | None = None,
) -> Report:
    embedder = Embedder(StubTokenizer(), engine, token_budget=4096, row_spec=row_spec)
    try:
        return selftest.run(embedder, None, reference, accuracy)
    finally:
        embedder.close()


@pytest.mark.parametrize(
    ("accuracy", "precision", "limit"),
    [
        (Accuracy.EXACT, Precision.F32, 0.99999),
        (Accuracy.STANDARD, Precision.F32, 0.999),
        (Accuracy.EXACT, Precision.F16, 0.999),
        (Accuracy.STANDARD, Precision.BF16, 0.999),
        (Accuracy.STANDARD, Precision.INT8, 0.95),
        (Accuracy.INT8, Precision.INT8, 0.95),
    ],
)
def test_limit_is_that_of_the_class_or_of_the_precision(
    accuracy: Accuracy, precision: Precision, limit: float
) -> None:
    # docs/quantization.md and docs/tuning.md name the limits.
    assert selftest.cosine_limit(accuracy, precision) == limit


def test_correct_engine_passes() -> None:
    report = run(StubEngine())

    assert report.passed
    assert report.reason == f"{len(GOLDEN)} golden texts agree."
    assert (report.max_deviation, report.seconds > 0) == (0.0, True)
    assert report.min_cosine == pytest.approx(1)


def test_nan_vector_fails() -> None:
    def set_nan(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors[0] = np.nan

    report = run(AlteredStub(set_nan))

    assert not report.passed
    assert "not finite" in report.reason


def test_vector_without_unit_length_fails() -> None:
    def double(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors *= 2

    report = run(AlteredStub(double))

    assert not report.passed
    assert "unit length" in report.reason


def test_vector_that_depends_on_the_other_texts_fails() -> None:
    def perturb(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        if len(vectors) > 1:
            vectors[:, :, 0] += 1e-3

    report = run(AlteredStub(perturb))

    assert not report.passed
    assert "alone and in a batch" in report.reason
    assert 5e-4 < report.max_deviation < 2e-3


@pytest.mark.parametrize(("shift", "passed"), [(0.01, True), (0.2, False)])
def test_f16_engine_may_deviate_within_its_accuracy_class(shift: float, passed: bool) -> None:
    def perturb(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        if len(vectors) > 1:
            vectors[:, :, 0] += shift
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)

    engine = AlteredStub(perturb)
    engine.precision = Precision.F16

    report = run(engine)

    assert report.max_deviation > selftest.F32_TOLERANCE
    assert report.passed is passed
    assert ("cosine" in report.reason) is not passed


def test_vectors_far_from_the_reference_fail() -> None:
    def turn(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors[:] = np.roll(vectors, 1, axis=-1)

    report = run(AlteredStub(turn), stub_vectors(GOLDEN))

    assert not report.passed
    assert "cosine" in report.reason
    assert report.min_cosine < 0.5


def shifted_stub(share: float) -> AlteredStub:
    """Return a stub whose vectors are shifted by a share of a wrong vector."""

    def shift(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors += share * np.roll(vectors, 1, axis=-1)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)

    return AlteredStub(shift)


STANDARD, EXACT = Accuracy.STANDARD, Accuracy.EXACT


@pytest.mark.parametrize(
    ("share", "standard", "exact"), [(0.0, True, True), (0.02, True, False), (0.2, False, False)]
)
def test_each_accuracy_class_has_a_minimum_cosine(
    share: float, standard: bool, exact: bool
) -> None:
    # The shares give cosines of 1, 0.9998 and 0.98.
    reference = stub_vectors(GOLDEN)

    reports = [run(shifted_stub(share), reference, accuracy) for accuracy in (STANDARD, EXACT)]

    assert [report.passed for report in reports] == [standard, exact]


def test_swapped_order_of_neighbors_fails() -> None:
    reference = stub_vectors(GOLDEN)
    reference[1] = reference[0] + 0.030 * reference[2] + 0.001 * reference[3]
    swapped = reference.copy()
    swapped[1] = reference[0] + 0.001 * reference[2] + 0.030 * reference[3]

    class Swapped(StubEngine):
        def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
            vectors = super().infer(batch)
            for at, vector in enumerate(stub_vectors(GOLDEN)):
                same = np.abs(vectors - vector).max(axis=-1) < 1e-6
                vectors[same] = swapped[at] / np.linalg.norm(swapped[at])
            return vectors

    report = run(Swapped(), reference)

    assert report.min_cosine > 0.999
    assert report.inversions > 0
    assert "triples" in report.reason


def test_packed_rows_pass() -> None:
    report = run(StubEngine(), stub_vectors(GOLDEN), row_spec=RowSpec.packed(256))

    assert report.passed, report.reason
    assert report.max_deviation == 0


def test_exception_of_the_engine_is_reported() -> None:
    def fail(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        raise ZeroDivisionError("odd")

    report = run(AlteredStub(fail))

    assert not report.passed
    assert "ZeroDivisionError" in report.reason


def test_model_without_published_vectors_passes(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    engine = OnnxRuntimeEngine(model, threads=1)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)

    report = selftest.run(embedder, model)
    embedder.close()

    assert report.passed, report.reason
    assert report.published_deviation == 0


@pytest.mark.model
def test_real_model_agrees_with_published_vectors() -> None:
    """The components were published by langchain4j and transformers.js."""
    model = real_model()
    engine = OnnxRuntimeEngine(model, threads=2)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)

    report = selftest.run(embedder, model)
    embedder.close()

    assert report.passed, report.reason
    assert 0 < report.published_deviation < 1e-6


@pytest.mark.model
def test_deviation_of_1e_4_from_a_published_component_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = real_model()
    text = next(iter(PUBLISHED))
    monkeypatch.setattr(selftest, "PUBLISHED", {text: {0: PUBLISHED[text][0] + 1e-4}})
    engine = OnnxRuntimeEngine(model, threads=2)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)

    report = selftest.run(embedder, model)
    embedder.close()

    assert not report.passed
    assert "published" in report.reason
