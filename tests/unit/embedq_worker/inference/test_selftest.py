"""The self-test lets honest engines pass and names what is wrong with the others."""

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


class Scripted(StubEngine):
    """A stub whose vectors are changed by a function of the token batch."""

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
    form: RowSpec | None = None,
) -> Report:
    """Run the self-test of a stub engine."""
    embedder = Embedder(StubTokenizer(), engine, token_budget=4096, form=form)
    try:
        return selftest.run(embedder, None, reference, accuracy)
    finally:
        embedder.close()


def test_honest_engine_passes() -> None:
    """The stub passes, with figures and a sentence."""
    report = run(StubEngine())

    assert report.passed
    assert report.reason == f"{len(GOLDEN)} golden texts agree."
    assert (report.max_deviation, report.seconds > 0) == (0.0, True)
    assert report.min_cosine == pytest.approx(1)


def test_nan_fails() -> None:
    """A vector that is not finite fails with a reason; nothing is raised."""

    def spoil(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors[0] = np.nan

    report = run(Scripted(spoil))

    assert not report.passed
    assert "not finite" in report.reason


def test_wrong_length_fails() -> None:
    """Vectors that should have unit length and do not are named."""

    def double(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors *= 2

    report = run(Scripted(double))

    assert not report.passed
    assert "unit length" in report.reason


def test_company_that_changes_vectors_fails() -> None:
    """A text that comes out differently among others is named, with the limit."""

    def blur(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        if len(vectors) > 1:
            vectors[:, :, 0] += 1e-3

    report = run(Scripted(blur))

    assert not report.passed
    assert "alone and in company" in report.reason
    assert 5e-4 < report.max_deviation < 2e-3


@pytest.mark.parametrize(("shift", "passed"), [(0.01, True), (0.2, False)])
def test_rounding_engine_is_judged_by_cosine(shift: float, passed: bool) -> None:
    """In f16 a text may differ in company as far as its accuracy class allows, and no farther."""

    def blur(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        if len(vectors) > 1:
            vectors[:, :, 0] += shift
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)

    engine = Scripted(blur)
    engine.precision = Precision.F16

    report = run(engine)

    assert report.max_deviation > selftest.F32_TOLERANCE
    assert report.passed is passed
    assert ("cosine" in report.reason) is not passed


def test_engine_that_differs_from_its_reference_fails() -> None:
    """Vectors of unit length that are simply others have a cosine far below the floor."""

    def turn(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors[:] = np.roll(vectors, 1, axis=-1)

    report = run(Scripted(turn), stub_vectors(GOLDEN))

    assert not report.passed
    assert "cosine" in report.reason
    assert report.min_cosine < 0.5


def blend(share: float) -> Scripted:
    """Make a stub whose vectors lean a little towards a wrong one, alone and in company alike."""

    def lean(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        vectors += share * np.roll(vectors, 1, axis=-1)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-9)

    return Scripted(lean)


STANDARD, EXACT = Accuracy.STANDARD, Accuracy.EXACT


@pytest.mark.parametrize(
    ("share", "standard", "exact"), [(0.0, True, True), (0.02, True, False), (0.2, False, False)]
)
def test_each_accuracy_class_has_its_floor(share: float, standard: bool, exact: bool) -> None:
    """A cosine of 0.9998 serves `standard` and not `exact`; one of 0.98 serves neither."""
    trusted = stub_vectors(GOLDEN)

    reports = [run(blend(share), trusted, accuracy) for accuracy in (STANDARD, EXACT)]

    assert [report.passed for report in reports] == [standard, exact]


def test_changed_order_of_neighbors_fails() -> None:
    """An engine that keeps cosines and swaps who is nearer to whom is caught."""
    trusted = stub_vectors(GOLDEN)
    trusted[1] = trusted[0] + 0.030 * trusted[2] + 0.001 * trusted[3]
    swapped = trusted.copy()
    swapped[1] = trusted[0] + 0.001 * trusted[2] + 0.030 * trusted[3]

    class Swapped(StubEngine):
        def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
            vectors = super().infer(batch)
            for at, vector in enumerate(stub_vectors(GOLDEN)):
                same = np.abs(vectors - vector).max(axis=-1) < 1e-6
                vectors[same] = swapped[at] / np.linalg.norm(swapped[at])
            return vectors

    report = run(Swapped(), trusted)

    assert report.min_cosine > 0.999
    assert report.inversions > 0
    assert "nearer" in report.reason


def test_packed_rows_pass() -> None:
    """Alone and in company is alone and packed for an engine of packed rows."""
    report = run(StubEngine(), stub_vectors(GOLDEN), form=RowSpec.packed(256))

    assert report.passed, report.reason
    assert report.max_deviation == 0


def test_failed_inference_is_a_report() -> None:
    """An engine that raises, whatever it raises, is a report and not an exception."""

    def fail(batch: TokenBatch, vectors: npt.NDArray[np.float32]) -> None:
        raise ZeroDivisionError("odd")

    report = run(Scripted(fail))

    assert not report.passed
    assert "ZeroDivisionError" in report.reason


def test_tiny_model_passes(tmp_path: Path) -> None:
    """A model nobody published passes on its own consistency."""
    model = tiny_model(tmp_path)
    engine = OnnxRuntimeEngine(model, threads=1)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)

    report = selftest.run(embedder, model)
    embedder.close()

    assert report.passed, report.reason
    assert report.published_deviation == 0


@pytest.mark.model
def test_real_model_agrees_with_published_vectors() -> None:
    """all-MiniLM-L6-v2 gives the components that langchain4j and transformers.js published."""
    model = real_model()
    engine = OnnxRuntimeEngine(model, threads=2)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)

    report = selftest.run(embedder, model)
    embedder.close()

    assert report.passed, report.reason
    assert 0 < report.published_deviation < 1e-6


@pytest.mark.model
def test_wrong_published_number_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published component that we miss by 1e-4 fails the test: the comparison is made."""
    model = real_model()
    text = next(iter(PUBLISHED))
    monkeypatch.setattr(selftest, "PUBLISHED", {text: {0: PUBLISHED[text][0] + 1e-4}})
    engine = OnnxRuntimeEngine(model, threads=2)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)

    report = selftest.run(embedder, model)
    embedder.close()

    assert not report.passed
    assert "published" in report.reason
