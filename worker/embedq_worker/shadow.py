"""One text in many batches, computed a second time in fp32 before the batch is committed.

The canary tells a device that computes nothing right. The shadow also meets the texts of the user,
so that a device whose vectors drift for some of them is found, if not at the first.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from embedq.message import EmbedBatch
from embedq_worker.answer import Vectors
from embedq_worker.errors import EngineError, InferFailed, ModelError, Reason
from embedq_worker.selftest import MIN_COSINES
from embedq_worker.serving import Proven

log = logging.getLogger("embedq.worker")


class Shadow:
    """Recomputes a text now and then."""

    def __init__(self, every: int, open_reference: Callable[[], Proven]) -> None:
        """Check one text in ``every`` batches.

        Args:
            every: batches; 0 checks none.
            open_reference: opens what computes in fp32, asked once and only when needed.
        """
        self._every = every
        self._open_reference = open_reference
        self._reference: Proven | None = None
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
                Reason.WRONG_SHADOW,
            )

    def _expected(self, alone: EmbedBatch) -> Vectors | None:
        """Return the fp32 vector of a text, float32 [D], or None where none is to be had."""
        try:
            if self._reference is None:
                self._reference = self._open_reference()
            vectors, _ = self._reference.embedder.embed(alone)
        except (EngineError, ModelError) as error:
            # The shadow's own trouble is no sign against the device.
            log.error("shadow_off reason=%s", error)
            self._every = 0
            return None
        found: Vectors = vectors[0]
        return found

    def close(self) -> None:
        """Give back what computes in fp32."""
        if self._reference is not None:
            self._reference.close()
