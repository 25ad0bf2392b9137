"""What a proven process embeds with: an engine for each accuracy class, opened when needed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from embedq.protocol.contract import Accuracy, Device, Precision
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import Vectors
from embedq.protocol.worker import ModelInfo
from embedq_worker.engines.base import Engine
from embedq_worker.errors import NotQuantized
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selection import CpuConfig
from embedq_worker.inference.selftest import MIN_COSINES, Report


@dataclass(frozen=True, slots=True)
class VerifiedEngine:
    """An engine that has passed its self-test.

    Attributes:
        engine: open.
        embedder: with that engine.
        report: what the self-test found.
        why: how the engine came to be chosen, in a word.
        layout: how it uses the cores; None where that is not ours to say.
    """

    engine: Engine
    embedder: Embedder
    report: Report
    why: str
    layout: CpuConfig | None = None

    def is_exact(self) -> bool:
        """Say whether this engine may serve class ``exact`` as well."""
        if self.engine.device is Device.NPU or self.engine.precision is not Precision.F32:
            return False
        return self.report.min_cosine >= MIN_COSINES[Accuracy.EXACT]

    def close(self) -> None:
        """Give the device back."""
        self.embedder.close()
        self.engine.close()


class ShadowCheck(Protocol):
    """Recomputes a text now and then; see embedq_worker.inference.verifier."""

    def check(self, batch: EmbedBatch, vectors: Vectors) -> None:
        """Compare one text of a batch, if it is this batch's turn."""

    def close(self) -> None:
        """Give back what it computes with."""


class EngineSet:
    """The engines of a process, one for each accuracy class.

    Attributes:
        model_info: of the model.
        standard: serves class ``standard``; its engine is what the worker announces.
    """

    def __init__(
        self,
        model_info: ModelInfo,
        standard: VerifiedEngine,
        open_exact: Callable[[], VerifiedEngine],
        open_int8: Callable[[], VerifiedEngine] | None = None,
        shadow: ShadowCheck | None = None,
    ) -> None:
        """Serve with an engine that is open.

        Args:
            model_info: of the model.
            standard: for class ``standard``, and for ``exact`` if it is good enough.
            open_exact: opens one for ``exact``, asked once and only if a batch wants it.
            open_int8: the same for ``int8``; None where that is not to be had.
            shadow: checks what ``standard`` computes; None where nothing is more trusted.
        """
        self.model_info = model_info
        self.standard = standard
        self._exact = standard if standard.is_exact() else None
        self._open_exact = open_exact
        self._open_int8 = open_int8
        self._int8: VerifiedEngine | NotQuantized | None = None
        self._opening = threading.Lock()
        self._shadow = shadow

    def engine_for(self, accuracy: Accuracy) -> VerifiedEngine:
        """Return what serves an accuracy class, opened now if it was not.

        Raises:
            NotQuantized: there is nothing to be trusted for ``int8``; asked again, nothing changes.
            EngineError: it does not open, or fails its self-test.
        """
        if accuracy is Accuracy.STANDARD:
            return self.standard
        with self._opening:
            if accuracy is Accuracy.INT8:
                return self._open_int8_engine()
            if self._exact is None:
                self._exact = self._open_exact()
            return self._exact

    def totals(self) -> dict[str, float]:
        """Return what all engines have computed, as names and numbers."""
        opened = (self.standard, self._exact, self._int8)
        engines = {id(proven): proven for proven in opened if isinstance(proven, VerifiedEngine)}
        summed: Counter[str] = Counter()
        for proven in engines.values():
            summed.update(asdict(proven.embedder.meter.totals()))
        return dict(summed)

    def check(self, batch: EmbedBatch, vectors: Vectors) -> None:
        """Let the shadow look at what the engine for class ``standard`` computed.

        Raises:
            InferFailed: the device computes wrong vectors.
        """
        if self._shadow is not None:
            self._shadow.check(batch, vectors)

    def _open_int8_engine(self) -> VerifiedEngine:
        if self._int8 is None:
            try:
                if self._open_int8 is None:
                    raise NotQuantized("This worker does not compute in int8.")
                self._int8 = self._open_int8()
            except NotQuantized as error:
                self._int8 = error
        if isinstance(self._int8, NotQuantized):
            raise self._int8
        return self._int8

    def close(self) -> None:
        """Give the devices back."""
        if self._shadow is not None:
            self._shadow.close()
        if isinstance(self._int8, VerifiedEngine) and self._int8 is not self.standard:
            self._int8.close()
        if self._exact is not None and self._exact is not self.standard:
            self._exact.close()
        self.standard.close()
