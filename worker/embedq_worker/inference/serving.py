"""Choose the verified engine for a batch by its accuracy class; open it when first needed."""

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
        engine: open engine.
        embedder: embedder that uses the engine.
        report: result of the self-test.
        why: how the engine was chosen, in one word.
        cpu_config: how the engine uses the cores; None for a device that decides itself.
    """

    engine: Engine
    embedder: Embedder
    report: Report
    why: str
    cpu_config: CpuConfig | None = None

    def is_exact(self) -> bool:
        """Say whether this engine may also serve class ``exact``."""
        if self.engine.device is Device.NPU or self.engine.precision is not Precision.F32:
            return False
        return self.report.min_cosine >= MIN_COSINES[Accuracy.EXACT]

    def close(self) -> None:
        """Close embedder and engine."""
        self.embedder.close()
        self.engine.close()


class ShadowCheck(Protocol):
    """Interface of embedq_worker.inference.verifier.ShadowCheck, which imports this module."""

    def check(self, batch: EmbedBatch, vectors: Vectors) -> None: ...

    def close(self) -> None: ...


class EngineSet:
    """The engines of a process, one for each accuracy class.

    Attributes:
        model_info: model that the worker announces.
        standard: engine for class ``standard``, which the worker announces.
    """

    def __init__(
        self,
        model_info: ModelInfo,
        standard: VerifiedEngine,
        open_exact: Callable[[], VerifiedEngine],
        open_int8: Callable[[], VerifiedEngine] | None = None,
        shadow: ShadowCheck | None = None,
    ) -> None:
        """Serve with an open engine; others are opened by the first batch that needs them.

        Args:
            model_info: model that the worker announces.
            standard: engine for class ``standard``, and for ``exact`` if it is accurate enough.
            open_exact: opens an engine for ``exact``; called at most once.
            open_int8: opens an engine for ``int8``; None if there is no quantized model.
            shadow: checks what ``standard`` computes; None for a CPU.
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
        """Return the engine for an accuracy class, and open it if it is not open yet.

        Raises:
            NotQuantized: this process has no valid engine for ``int8``; a retry does not help.
            EngineError: the engine does not open, or fails its self-test.
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
        """Return the counters of all engines, summed."""
        opened = (self.standard, self._exact, self._int8)
        engines = {
            id(verified): verified for verified in opened if isinstance(verified, VerifiedEngine)
        }
        summed: Counter[str] = Counter()
        for verified in engines.values():
            summed.update(asdict(verified.embedder.meter.totals()))
        return dict(summed)

    def check(self, batch: EmbedBatch, vectors: Vectors) -> None:
        """Run the shadow check on vectors of the engine for class ``standard``.

        Raises:
            InferFailed: the device computes wrong vectors.
        """
        if self._shadow is not None:
            self._shadow.check(batch, vectors)

    def _open_int8_engine(self) -> VerifiedEngine:
        if self._int8 is None:
            try:
                if self._open_int8 is None:
                    raise NotQuantized("This worker has no quantized model for accuracy int8.")
                self._int8 = self._open_int8()
            except NotQuantized as error:
                self._int8 = error
        if isinstance(self._int8, NotQuantized):
            raise self._int8
        return self._int8

    def close(self) -> None:
        """Close all engines."""
        if self._shadow is not None:
            self._shadow.close()
        if isinstance(self._int8, VerifiedEngine) and self._int8 is not self.standard:
            self._int8.close()
        if self._exact is not None and self._exact is not self.standard:
            self._exact.close()
        self.standard.close()
