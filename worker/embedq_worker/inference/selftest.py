"""Golden texts through an engine.

Texts by which an engine is judged, and what others published about them.

Golden texts: is this engine telling the truth? Asked before it serves, and after each doubt.

Four questions: are vectors finite and of unit length; does a text get the same vector alone and in
company; do the vectors agree with published ones and with a reference; and are of two texts the
same ones nearer to a third.
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

#: Components that others published for all-MiniLM-L6-v2: text -> place -> value.
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


#: Texts of every length from none to more than any model takes.
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


#: Largest deviation of a component in f32 between alone and in company, and from published
#: numbers: what packed rows may differ from padded ones (all-MiniLM-L6-v2: 2e-7). Arithmetic that
#: rounds has no such number that holds for every model; there the class's cosine is the limit.
F32_TOLERANCE: Final = 2e-5


#: Smallest cosine to the reference that each accuracy class promises.
MIN_COSINES: Final[Mapping[Accuracy, float]] = {
    Accuracy.STANDARD: 0.999,
    Accuracy.EXACT: 0.99999,
    Accuracy.INT8: 0.95,
}


#: How much nearer of two texts the reference must see one before an engine has to agree.
RANK_MARGIN: Final = 0.02


#: The same for int8.
RANK_MARGIN_INT8: Final = 0.1


#: Largest deviation of a vector's length from 1.
NORM_TOLERANCE: Final = 1e-2


@dataclass(frozen=True, slots=True)
class Report:
    """What a self-test found.

    Attributes:
        passed: the engine may serve.
        reason: a sentence, also when it passed.
        max_deviation: largest difference of a component between alone and in company.
        published_deviation: the same between ours and what others published; 0 if nobody did.
        min_cosine: smallest cosine to the reference, and between alone and in company.
        inversions: triples of texts of which another one is the nearer than in the reference.
        norm_error: largest difference of a vector's length from 1.
        seconds: how long it took.
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
    """Ask an engine the golden texts; raises nothing, a failure is a report.

    Args:
        embedder: with the engine in question.
        model: what it serves; None for the stub.
        reference: what the golden texts should give, float32 [n, D]; None where nothing is trusted
            more than this engine.
        accuracy: the class that it is to serve.
    """
    began = time.perf_counter()
    report = Report(False, "The self-test did not end.")
    try:
        report = _measure(embedder, model, reference)
        unit_length = model is None or model.normalize
        exact = embedder.engine.precision is Precision.F32
        tolerance = F32_TOLERANCE if exact else math.inf
        reason = _complaint(report, tolerance, MIN_COSINES[accuracy], unit_length)
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


def embed_golden(embedder: Embedder, model: Model | None) -> Vectors:
    """Embed the golden texts in one batch, float32 [n, D].

    Raises:
        EngineError: the engine cannot.
    """
    return _embed(embedder, model, GOLDEN)


def _measure(embedder: Embedder, model: Model | None, reference: Vectors | None) -> Report:
    """Take the figures; whether they are good enough is another question."""
    company = embed_golden(embedder, model)
    with ThreadPoolExecutor(embedder.engine.concurrency) as callers:
        each = callers.map(lambda text: _embed(embedder, model, [text]), GOLDEN)
        alone = np.concatenate(list(each))
    trusted = alone if reference is None else reference
    is_int8 = embedder.engine.precision is Precision.INT8
    margin = RANK_MARGIN_INT8 if is_int8 else RANK_MARGIN
    return Report(
        passed=False,
        reason="",
        max_deviation=float(np.abs(company - alone).max()),
        published_deviation=_published_deviation(company) if model and model.pinned else 0.0,
        min_cosine=min(
            _min_cosine(company, trusted), _min_cosine(alone, trusted), _min_cosine(company, alone)
        ),
        inversions=_inversions(company, trusted, margin),
        norm_error=float(np.abs(np.linalg.norm(company, axis=1) - 1).max()),
    )


def _complaint(report: Report, tolerance: float, min_cosine: float, unit_length: bool) -> str:
    """Say what is wrong with the figures; empty if nothing is."""
    if unit_length and report.norm_error > NORM_TOLERANCE:
        return f"A golden vector misses unit length by {report.norm_error:.1e}."
    if report.max_deviation > tolerance:
        return (
            f"A golden text differs by {report.max_deviation:.1e} alone and in company; "
            f"the limit is {tolerance:.0e}."
        )
    if report.published_deviation > tolerance:
        return (
            f"A golden vector differs by {report.published_deviation:.1e} from the published one; "
            f"the limit is {tolerance:.0e}."
        )
    if report.min_cosine < min_cosine:
        return f"A golden vector has cosine {report.min_cosine:.6f}; the floor is {min_cosine}."
    if report.inversions:
        return f"Of {report.inversions} pairs of golden texts the wrong one is nearer to a third."
    return ""


def _inversions(found: Vectors, trusted: Vectors, margin: float) -> int:
    """Count triples (a, b, c) with b clearly nearer to a than c is, and now farther."""
    near, now = _cosines(trusted), _cosines(found)
    return sum(
        bool(near[a, b] - near[a, c] > margin and now[a, b] <= now[a, c])
        for a, b, c in itertools.permutations(range(len(trusted)), 3)
    )


def _cosines(vectors: Vectors) -> Vectors:
    lengths = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    unit = vectors / lengths
    product: Vectors = unit @ unit.T
    return product


def _embed(embedder: Embedder, model: Model | None, texts: Sequence[str]) -> Vectors:
    """Embed texts as a job would, float32 [n, D]; a vector that is not finite raises."""
    spec = VectorSpec(
        model=model.identity if model else "0" * 64,
        dim=embedder.engine.dim,
        max_length=embedder.tokenizer.max_length,
    )
    return embedder.embed(EmbedBatch("selftest", 0, texts, spec))[0]


def _min_cosine(one: Vectors, other: Vectors) -> float:
    lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return float(((one * other).sum(axis=1) / np.maximum(lengths, 1e-12)).min())


def _published_deviation(company: Vectors) -> float:
    return max(
        abs(float(company[GOLDEN.index(text), place]) - value)
        for text, components in PUBLISHED.items()
        for place, value in components.items()
    )
