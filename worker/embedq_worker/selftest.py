"""Golden texts: is this engine telling the truth? Asked before it serves, and after each doubt.

Three questions: are vectors finite and of unit length; does a text get the same vector alone and in
company; and do the vectors agree with published ones and with a reference engine, where there is
one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq.contract import EmbedBatch, Precision, VectorSpec
from embedq.errors import EmbedqError
from embedq_worker.embedder import Embedder
from embedq_worker.models import Model

Vectors = npt.NDArray[np.float32]

#: Largest deviation of a component between alone and in company, and from published numbers.
#: Only f32 is measured (1e-7); the others are guesses from how many bits they keep. Measure an
#: engine of another precision before it relies on them.
TOLERANCES: Final[Mapping[Precision, float]] = {
    Precision.F32: 1e-5,
    Precision.F16: 2e-3,
    Precision.BF16: 1e-2,
    Precision.INT8: 5e-2,
}
#: Smallest cosine to the reference engine.
MIN_COSINE: Final = 0.999
#: Largest deviation of a vector's length from 1.
NORM_TOLERANCE: Final = 1e-2

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

_SENTENCE = "A queue is a promise that work will be done later, and a worker is who keeps it. "

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


@dataclass(frozen=True, slots=True)
class Report:
    """What a self-test found.

    Attributes:
        passed: the engine may serve.
        reason: a sentence, also when it passed.
        max_deviation: largest difference of a component between alone and in company.
        published_deviation: the same between ours and what others published; 0 if nobody did.
        min_cosine: smallest cosine to the reference engine, or to itself alone without one.
        norm_error: largest difference of a vector's length from 1.
        seconds: how long it took.
    """

    passed: bool
    reason: str
    max_deviation: float = 0.0
    published_deviation: float = 0.0
    min_cosine: float = 1.0
    norm_error: float = 0.0
    seconds: float = 0.0


def run(embedder: Embedder, model: Model | None, reference: Embedder | None = None) -> Report:
    """Ask an engine the golden texts; raises nothing, a failure is a report.

    Args:
        embedder: with the engine in question.
        model: what it serves; None for the stub.
        reference: with an engine that is trusted, of the same model.
    """
    began = time.perf_counter()
    report = Report(False, "The self-test did not end.")
    try:
        report = _measure(embedder, model, reference)
        unit_length = model is None or model.normalize
        reason = _complaint(report, TOLERANCES[embedder.engine.precision], unit_length)
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


def _measure(embedder: Embedder, model: Model | None, reference: Embedder | None) -> Report:
    """Take the figures; whether they are good enough is another question."""
    company = _embed(embedder, model, GOLDEN)
    alone = np.concatenate([_embed(embedder, model, [text]) for text in GOLDEN])
    trusted = alone if reference is None else _embed(reference, model, GOLDEN)
    return Report(
        passed=False,
        reason="",
        max_deviation=float(np.abs(company - alone).max()),
        published_deviation=_published_deviation(company) if model and model.pinned else 0.0,
        min_cosine=_min_cosine(company, trusted),
        norm_error=float(np.abs(np.linalg.norm(company, axis=1) - 1).max()),
    )


def _complaint(report: Report, tolerance: float, unit_length: bool) -> str:
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
    if report.min_cosine < MIN_COSINE:
        return f"A golden vector has cosine {report.min_cosine:.5f}; the floor is {MIN_COSINE}."
    return ""


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
