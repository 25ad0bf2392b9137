"""Self-test gate, references, shadow check.

What the golden texts should give: computed once in fp32 by onnxruntime, then kept.

The file lies beside the compiled models of the same model, so that a worker whose engine is proven
needs neither onnxruntime nor the graph for its next start.

Proves engines: asks each the golden texts before it may serve, and keeps what is trusted.

One text in many batches, computed a second time in fp32 before the batch is committed.

The canary tells a device that computes nothing right. The shadow also meets the texts of the user,
so that a device whose vectors drift for some of them is found, if not at the first.
"""

from __future__ import annotations

import hashlib
import io
import logging
import random
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from embedq.protocol.contract import Accuracy
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import Vectors
from embedq_worker.engines.base import Engine
from embedq_worker.engines.factory import open_engine
from embedq_worker.errors import EngineError, FailureReason, InferFailed, ModelError
from embedq_worker.files import read_private, replace_private
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selection import DEFAULT_TOKEN_BUDGET, CpuConfig
from embedq_worker.inference.selftest import GOLDEN, MIN_COSINES
from embedq_worker.inference.serving import VerifiedEngine
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model
from embedq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)


#: Bytes of the checksum that a file begins with.
DIGEST_BYTES: Final = 32


#: Most bytes of a file; a larger one is not ours.
MAX_BYTES: Final = 1024 * 1024


def load_or_make(model: Model, cache_dir: Path, make: Callable[[], Vectors]) -> Vectors:
    """Return the vectors of the golden texts, float32 [n, D].

    Args:
        model: whose vectors.
        cache_dir: where they are kept.
        make: computes them; asked only where none are kept, or none that are to be trusted.

    Raises:
        EngineError: they cannot be computed.
    """
    path = cache_dir / "compiled" / model.identity[:16] / _name()
    kept = _load(path, (len(GOLDEN), model.dim))
    if kept is not None:
        return kept
    vectors = make()
    _keep(path, vectors)
    return vectors


def _name() -> str:
    """Name everything that shapes them, beside the model."""
    asked = hashlib.sha256("\0".join(GOLDEN).encode()).hexdigest()[:12]
    return f"reference-{asked}-onnxruntime-{version('onnxruntime')}"


def _load(path: Path, shape: tuple[int, int]) -> Vectors | None:
    found = read_private(path, MAX_BYTES)
    if found is None:
        return None
    digest, body = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        log.warning("reference_invalid path=%s", path)
        return None
    vectors: Vectors = np.load(io.BytesIO(body), allow_pickle=False)
    return vectors if vectors.shape == shape and vectors.dtype == np.float32 else None


def _keep(path: Path, vectors: Vectors) -> None:
    """Replace the file; a cache that cannot be written costs the next start a second."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    body = buffer.getvalue()
    try:
        replace_private(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        log.debug("reference_write_failed path=%s reason=%s", path, error.strerror)


class EngineVerifier:
    """Proves engines for one model.

    Attributes:
        tokenizer: of the model.
    """

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self.tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
        if model.vocab_size:
            self.tokenizer.require_below(model.vocab_size)
        self._settings = settings
        self._model = model

    def verify(
        self,
        engine: Engine,
        accuracy: Accuracy,
        reference: Vectors | None,
        why: str,
        layout: CpuConfig | None = None,
    ) -> VerifiedEngine:
        """Ask an engine the golden texts; one that fails is closed.

        Raises:
            EngineError: it fails.
        """
        budget = layout.token_budget if layout else self._settings.token_budget
        budget = budget or DEFAULT_TOKEN_BUDGET
        embedder = Embedder(self.tokenizer, engine, token_budget=budget)
        report = selftest.run(embedder, self._model, reference, accuracy)
        proven = VerifiedEngine(engine, embedder, report, why, layout)
        log.info(
            "selftest passed=%s engine=%s device=%s precision=%s min_cosine=%.6f "
            "max_deviation=%.1e inversions=%d seconds=%.2f",
            report.passed,
            engine.name,
            engine.device,
            engine.precision,
            report.min_cosine,
            report.max_deviation,
            report.inversions,
            report.seconds,
        )
        if not report.passed:
            proven.close()
            raise EngineError(
                f"The self-test failed: {report.reason}", FailureReason.SELFTEST_FAILED
            )
        return proven

    def reference(self) -> Vectors:
        """Return what the golden texts should give, float32 [n, D], computed where none is kept.

        Raises:
            EngineError: they cannot be computed.
        """
        return load_or_make(self._model, self._settings.cache_dir, self._make_reference)

    def open_reference(self) -> VerifiedEngine:
        """Open what every other engine is compared with: onnxruntime in fp32, on one core.

        Raises:
            EngineError: it does not open, or fails its self-test.
        """
        engine = open_engine("onnxruntime", self._model, 1)
        return self.verify(engine, Accuracy.EXACT, None, "reference")

    def _make_reference(self) -> Vectors:
        proven = self.open_reference()
        try:
            return selftest.embed_golden(proven.embedder, self._model)
        finally:
            proven.close()


class ShadowCheck:
    """Recomputes a text now and then."""

    def __init__(self, every: int, open_reference: Callable[[], VerifiedEngine]) -> None:
        """Check one text in ``every`` batches.

        Args:
            every: batches; 0 checks none.
            open_reference: opens what computes in fp32, asked once and only when needed.
        """
        self._every = every
        self._open_reference = open_reference
        self._reference: VerifiedEngine | None = None
        self._batches = 0

    def check(self, batch: EmbedBatch, vectors: Vectors) -> None:
        """Compare one text of a batch with its fp32 vector, if it is this batch's turn.

        Args:
            batch: what was embedded.
            vectors: float32 [n, D], NaN where a text failed.

        Raises:
            InferFailed: the device's vector is outside the accuracy class of the job.
        """
        self._batches += 1
        if not self._every or self._batches % self._every:
            return
        rows = np.flatnonzero(np.isfinite(vectors).all(axis=1))
        if not len(rows):
            return
        row = int(random.choice(rows))
        expected = self._expected(replace(batch, texts=[batch.texts[row]], refused={}))
        if expected is None:
            return
        # Both have length 1, to the tolerance of the self-test.
        lengths = float(np.linalg.norm(expected) * np.linalg.norm(vectors[row]))
        cosine = float(expected @ vectors[row]) / max(lengths, 1e-12)
        log.debug("shadow_checked job=%s index=%d cosine=%.6f", batch.job, batch.index, cosine)
        floor = MIN_COSINES[batch.spec.accuracy]
        # Asked so that NaN fails.
        if not cosine >= floor:
            raise InferFailed(
                f"A text recomputed in fp32 has cosine {cosine:.5f} to the device's vector; the "
                f"floor of class {batch.spec.accuracy} is {floor}. The device computes wrong "
                "vectors.",
                FailureReason.SHADOW_MISMATCH,
            )

    def _expected(self, alone: EmbedBatch) -> Vectors | None:
        """Return the fp32 vector of a text, float32 [D], or None where none is to be had."""
        try:
            if self._reference is None:
                self._reference = self._open_reference()
            vectors, _ = self._reference.embedder.embed(alone)
        except (EngineError, ModelError) as error:
            # The shadow's own trouble is no sign against the device.
            log.error("shadow_check_disabled reason=%s", error)
            self._every = 0
            return None
        found: Vectors = vectors[0]
        return found

    def close(self) -> None:
        """Give back what computes in fp32."""
        if self._reference is not None:
            self._reference.close()
