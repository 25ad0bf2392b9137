"""Verify engines with a self-test before they serve, and with shadow checks while they serve.

The self-test compares the golden texts with reference vectors, which onnxruntime computes once in
fp32 and the cache stores beside the compiled models. The canary detects a device whose vectors are
all wrong; the shadow check also detects one whose vectors are wrong for some texts.
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

from embedq.protocol.contract import Accuracy, Precision
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import Vectors
from embedq_worker.engines.base import Engine
from embedq_worker.engines.factory import open_engine
from embedq_worker.errors import EngineError, FailureReason, InferFailed, ModelError
from embedq_worker.files import read_private, replace_private
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selection import DEFAULT_TOKEN_BUDGET, CpuConfig
from embedq_worker.inference.selftest import GOLDEN
from embedq_worker.inference.serving import VerifiedEngine
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model
from embedq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Length of the checksum at the start of a reference file, bytes.
DIGEST_BYTES: Final = 32


def load_or_compute(model: Model, cache_dir: Path, compute: Callable[[], Vectors]) -> Vectors:
    """Return the reference vectors of the golden texts, float32 [n, D], from the cache if valid.

    Args:
        model: model that the vectors belong to.
        cache_dir: worker's cache folder.
        compute: computes the vectors; called if the cache has no valid file.

    Raises:
        EngineError: the vectors cannot be computed.
    """
    texts = hashlib.sha256("\0".join(GOLDEN).encode()).hexdigest()[:12]
    name = f"reference-{texts}-onnxruntime-{version('onnxruntime')}"
    path = cache_dir / "compiled" / model.identity[:16] / name
    cached = _load(path, (len(GOLDEN), model.dim))
    if cached is not None:
        return cached
    vectors = compute()
    _store(path, vectors)
    return vectors


def _load(path: Path, shape: tuple[int, int]) -> Vectors | None:
    found = read_private(path)
    if found is None:
        return None
    digest, body = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        log.warning("reference_invalid path=%s", path)
        return None
    vectors: Vectors = np.load(io.BytesIO(body), allow_pickle=False)
    return vectors if vectors.shape == shape and vectors.dtype == np.float32 else None


def _store(path: Path, vectors: Vectors) -> None:
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    body = buffer.getvalue()
    try:
        replace_private(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        # Debug only: the next start computes the vectors again, which takes a second.
        log.debug("reference_write_failed path=%s reason=%s", path, error.strerror)


class EngineVerifier:
    """Verifies engines for one model.

    Attributes:
        tokenizer: tokenizer of the model.
    """

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self.tokenizer = Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)
        if model.vocab_size:
            self.tokenizer.check_ids_below(model.vocab_size)
        self._settings = settings
        self._model = model

    def verify(
        self,
        engine: Engine,
        accuracy: Accuracy,
        reference: Vectors | None,
        why: str,
        cpu_config: CpuConfig | None = None,
    ) -> VerifiedEngine:
        """Run the self-test on an engine, and close the engine if it fails.

        Args:
            engine: open engine.
            accuracy: accuracy class that it is to serve.
            reference: reference vectors; None for the engine that is the reference.
            why: how the engine was chosen, in one word.
            cpu_config: how the engine uses the cores; None for a device that decides itself.

        Raises:
            EngineError: the self-test failed.
        """
        budget = cpu_config.token_budget if cpu_config else self._settings.token_budget
        budget = budget or DEFAULT_TOKEN_BUDGET
        embedder = Embedder(
            self.tokenizer,
            engine,
            token_budget=budget,
            prompt_tokens=None if self._model.include_prompt else self.tokenizer.prompt_tokens,
            position_pad_id=self._model.architecture.get("position_pad_id"),
        )
        report = selftest.run(embedder, self._model, reference, accuracy)
        verified = VerifiedEngine(engine, embedder, report, why, cpu_config)
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
            verified.close()
            raise EngineError(
                f"The self-test failed: {report.reason}", FailureReason.SELFTEST_FAILED
            )
        return verified

    def reference(self) -> Vectors:
        """Return the reference vectors of the golden texts, float32 [n, D].

        Raises:
            EngineError: the vectors cannot be computed.
        """
        return load_or_compute(self._model, self._settings.cache_dir, self._compute_reference)

    def open_reference(self) -> VerifiedEngine:
        """Open the reference engine: onnxruntime in fp32, on one core.

        Raises:
            EngineError: the engine does not open, or fails its self-test.
        """
        engine = open_engine("onnxruntime", self._model, 1)
        return self.verify(engine, Accuracy.EXACT, None, "reference")

    def _compute_reference(self) -> Vectors:
        verified = self.open_reference()
        try:
            return selftest.embed_golden(verified.embedder, self._model)
        finally:
            verified.close()


class ShadowCheck:
    """Recomputes one text of every n-th batch in fp32."""

    def __init__(self, every: int, open_reference: Callable[[], VerifiedEngine]) -> None:
        """Prepare the check; the reference engine is opened by the first one.

        Args:
            every: number of batches per check; 0 disables the check.
            open_reference: opens the reference engine; called at most once.
        """
        self._every = every
        self._open_reference = open_reference
        self._reference: VerifiedEngine | None = None
        self._batches = 0

    def check(self, batch: EmbedBatch, vectors: Vectors) -> None:
        """Compare the vector of one random text with fp32, once in ``every`` batches.

        Args:
            batch: batch that was computed.
            vectors: its vectors, float32 [n, D], NaN where a text failed.

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
        lengths = float(np.linalg.norm(expected) * np.linalg.norm(vectors[row]))
        cosine = float(expected @ vectors[row]) / max(lengths, 1e-12)
        log.debug("shadow_checked job=%s index=%d cosine=%.6f", batch.job, batch.index, cosine)
        precision = self._reference.engine.precision if self._reference else Precision.F32
        minimum = selftest.cosine_limit(batch.spec.accuracy, precision)
        if not cosine >= minimum:  # `not >=`, because NaN must fail
            raise InferFailed(
                f"A text recomputed in fp32 has cosine {cosine:.5f} to the device's vector; the "
                f"minimum of class {batch.spec.accuracy} is {minimum}. The device computes wrong "
                "vectors.",
                FailureReason.SHADOW_MISMATCH,
            )

    def _expected(self, alone: EmbedBatch) -> Vectors | None:
        try:
            if self._reference is None:
                self._reference = self._open_reference()
            vectors, _ = self._reference.embedder.embed(alone)
        except (EngineError, ModelError) as error:
            # A fault of the reference engine says nothing about the device.
            log.error("shadow_check_disabled reason=%s", error)
            self._every = 0
            return None
        found: Vectors = vectors[0]
        return found

    def close(self) -> None:
        """Close the reference engine."""
        if self._reference is not None:
            self._reference.close()
