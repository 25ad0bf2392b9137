"""Test an engine with golden texts.

The test checks that vectors are finite and of unit length, that a text has the same vector alone
and in a batch, that vectors agree with the reference and with published ones, and that nearest
neighbors keep the order of the reference.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from embedq.errors import EmbedqError
from embedq.protocol.contract import Accuracy, Precision, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import Vectors
from embedq_worker.inference.embedder import CANARY_TEXT, Embedder
from embedq_worker.model.resolve import Model

#: Published vector components of all-MiniLM-L6-v2: text -> index -> value.
#: Sources: langchain4j AllMiniLmL6V2EmbeddingModelIT.java (from sentence-transformers) and
#: transformers.js pipelines/feature-extraction.js.
PUBLISHED: Final[Mapping[str, Mapping[int, float]]] = {
    "I love sentence transformers.": {
        0: -0.0803190097,
        1: -0.0171345081,
        382: 0.0478825271,
        383: -0.0561899580,
    },
    "This is a simple test.": {0: 0.0952821523, 1: -0.0247301683},
}

_SENTENCE = CANARY_TEXT

#: Golden texts, of all lengths from empty to longer than the limit of any model.
GOLDEN: Final[Sequence[str]] = (
    *PUBLISHED,
    "",
    "hi",
    "Ein Satz auf Deutsch; une phrase en français; 日本語の文。",
    "def embed(texts: list[str]) -> np.ndarray: ...",
    _SENTENCE,
    _SENTENCE * 3,
    _SENTENCE * 40,
)

#: Largest deviation of a component in f32, between a text alone and in a batch, and from published
#: vectors. In lower precision no limit holds for every model, so only the class's cosine counts.
F32_TOLERANCE: Final = 2e-5

#: Smallest cosine to the reference, by accuracy class.
MIN_COSINES: Final[Mapping[Accuracy, float]] = {
    Accuracy.STANDARD: 0.999,
    Accuracy.EXACT: 0.99999,
    Accuracy.INT8: 0.95,
}

#: The strictest class that an engine of each precision meets. Its vectors depend on the batch: with
#: int8, one scale quantizes all texts of an inference.
_STRICTEST: Final[Mapping[Precision, Accuracy]] = {
    Precision.F32: Accuracy.EXACT,
    Precision.F16: Accuracy.STANDARD,
    Precision.BF16: Accuracy.STANDARD,
    Precision.INT8: Accuracy.INT8,
}

#: Smallest difference of two cosines in the reference from which their order must be the same.
RANK_MARGIN: Final = 0.02

#: The same limit for int8.
RANK_MARGIN_INT8: Final = 0.1

#: Largest deviation of a vector's length from 1.
NORM_TOLERANCE: Final = 1e-2


@dataclass(frozen=True, slots=True)
class Report:
    """Result of a self-test.

    Attributes:
        passed: whether the engine may serve.
        reason: one sentence, also when it passed.
        max_deviation: largest difference of a component between a text alone and in a batch.
        published_deviation: largest difference of a component from published vectors; 0 if none
            are published for this model.
        min_cosine: smallest cosine to the reference, and between a text alone and in a batch.
        inversions: number of text triples with another order of cosines than in the reference.
        norm_error: largest difference of a vector's length from 1.
        seconds: duration of the test.
    """

    passed: bool
    reason: str
    max_deviation: float = 0.0
    published_deviation: float = 0.0
    min_cosine: float = 1.0
    inversions: int = 0
    norm_error: float = 0.0
    seconds: float = 0.0


def run(
    embedder: Embedder,
    model: Model | None,
    reference: Vectors | None = None,
    accuracy: Accuracy = Accuracy.STANDARD,
) -> Report:
    """Test an engine; never raises, a failure is a report.

    Args:
        embedder: embedder with the engine to test.
        model: model of the engine; None for the stub.
        reference: reference vectors of the golden texts, float32 [n, D]; None if this engine is the
            reference.
        accuracy: accuracy class that the engine is to serve.
    """
    began = time.perf_counter()
    report = Report(False, "The self-test did not end.")
    try:
        report = _measure(embedder, model, reference)
        unit_length = model is None or model.normalize
        exact = embedder.engine.precision is Precision.F32
        tolerance = F32_TOLERANCE if exact else math.inf
        limit = cosine_limit(accuracy, embedder.engine.precision)
        reason = _failure(report, tolerance, limit, unit_length)
    except EmbedqError as error:
        reason = str(error)
    except Exception as error:
        reason = f"The self-test stopped at {type(error).__name__}: {error}"
    return replace(
        report,
        passed=not reason,
        reason=reason or f"{len(GOLDEN)} golden texts agree.",
        seconds=time.perf_counter() - began,
    )


def cosine_limit(accuracy: Accuracy, precision: Precision) -> float:
    """Return the smallest cosine to the reference for an engine of this precision."""
    return min(MIN_COSINES[accuracy], MIN_COSINES[_STRICTEST[precision]])


def embed_golden(embedder: Embedder, model: Model | None) -> Vectors:
    """Embed the golden texts in one batch, float32 [n, D].

    Raises:
        EngineError: the engine or the tokenizer failed.
    """
    return _embed(embedder, model, GOLDEN)


def _measure(embedder: Embedder, model: Model | None, reference: Vectors | None) -> Report:
    batched = embed_golden(embedder, model)
    with ThreadPoolExecutor(embedder.engine.concurrency) as callers:
        each = callers.map(lambda text: _embed(embedder, model, [text]), GOLDEN)
        alone = np.concatenate(list(each))
    expected = alone if reference is None else reference
    published = _published_deviation(batched) if model and model.pinned else 0.0
    # Some models make no token of the empty text, which then has no vector.
    has_vector = np.isfinite(batched).all(axis=1)
    batched, alone, expected = (vectors[has_vector] for vectors in (batched, alone, expected))
    is_int8 = embedder.engine.precision is Precision.INT8
    margin = RANK_MARGIN_INT8 if is_int8 else RANK_MARGIN
    return Report(
        passed=False,
        reason="",
        max_deviation=float(np.abs(batched - alone).max()),
        published_deviation=published,
        min_cosine=min(
            _min_cosine(batched, expected),
            _min_cosine(alone, expected),
            _min_cosine(batched, alone),
        ),
        inversions=_inversions(batched, expected, margin),
        norm_error=float(np.abs(np.linalg.norm(batched, axis=1) - 1).max()),
    )


def _failure(report: Report, tolerance: float, min_cosine: float, unit_length: bool) -> str:
    if unit_length and report.norm_error > NORM_TOLERANCE:
        return (
            f"A golden vector deviates from unit length by {report.norm_error:.1e}; "
            f"the limit is {NORM_TOLERANCE:.0e}."
        )
    if report.max_deviation > tolerance:
        return (
            f"A golden text differs by {report.max_deviation:.1e} alone and in a batch; "
            f"the limit is {tolerance:.0e}."
        )
    if report.published_deviation > tolerance:
        return (
            f"A golden vector differs by {report.published_deviation:.1e} from the published one; "
            f"the limit is {tolerance:.0e}."
        )
    if report.min_cosine < min_cosine:
        return f"A golden vector has cosine {report.min_cosine:.6f}; the minimum is {min_cosine}."
    if report.inversions:
        return (
            f"{report.inversions} triples of golden texts have another order of cosines than in "
            "the reference."
        )
    return ""


def _inversions(found: Vectors, expected: Vectors, margin: float) -> int:
    # Triples (a, b, c) with b clearly nearer to a than c in the reference, and now farther.
    near, now = _cosines(expected), _cosines(found)
    return sum(
        bool(near[a, b] - near[a, c] > margin and now[a, b] <= now[a, c])
        for a, b, c in itertools.permutations(range(len(expected)), 3)
    )


def _cosines(vectors: Vectors) -> Vectors:
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = vectors / lengths
    product: Vectors = unit @ unit.T
    return product


def _embed(embedder: Embedder, model: Model | None, texts: Sequence[str]) -> Vectors:
    spec = VectorSpec(
        model=model.identity if model else "0" * 64,
        dim=embedder.engine.dim,
        max_length=embedder.tokenizer.max_length,
    )
    return embedder.embed(EmbedBatch("selftest", 0, texts, spec))[0]


def _min_cosine(one: Vectors, other: Vectors) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / np.maximum(lengths, 1e-12)).min())


def _published_deviation(batched: Vectors) -> float:
    return max(
        abs(float(batched[GOLDEN.index(text), index]) - value)
        for text, components in PUBLISHED.items()
        for index, value in components.items()
    )
