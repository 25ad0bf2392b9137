"""Proves engines: asks each the golden texts before it may serve, and keeps what is trusted."""

from __future__ import annotations

import logging

from embedq.contract import Accuracy
from embedq_worker import references, selftest
from embedq_worker.embedder import Embedder
from embedq_worker.engines import open_engine
from embedq_worker.engines.base import Engine
from embedq_worker.errors import EngineError, Reason
from embedq_worker.layouts import DEFAULT_TOKEN_BUDGET
from embedq_worker.models import Model
from embedq_worker.references import Vectors
from embedq_worker.serving import Proven
from embedq_worker.settings import WorkerSettings
from embedq_worker.tokenization import Tokenizer
from embedq_worker.tuning import Layout

log = logging.getLogger("embedq.worker")


class Prover:
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

    def prove(
        self,
        engine: Engine,
        accuracy: Accuracy,
        reference: Vectors | None,
        why: str,
        layout: Layout | None = None,
    ) -> Proven:
        """Ask an engine the golden texts; one that fails is closed.

        Raises:
            EngineError: it fails.
        """
        budget = layout.token_budget if layout else self._settings.token_budget
        budget = budget or DEFAULT_TOKEN_BUDGET
        embedder = Embedder(self.tokenizer, engine, token_budget=budget)
        report = selftest.run(embedder, self._model, reference, accuracy)
        proven = Proven(engine, embedder, report, why, layout)
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
            raise EngineError(f"The self-test failed: {report.reason}", Reason.SELFTEST_FAILED)
        return proven

    def reference(self) -> Vectors:
        """Return what the golden texts should give, float32 [n, D], computed where none is kept.

        Raises:
            EngineError: they cannot be computed.
        """
        return references.load_or_make(self._model, self._settings.cache_dir, self._make_reference)

    def open_reference(self) -> Proven:
        """Open what every other engine is compared with: onnxruntime in fp32, on one core.

        Raises:
            EngineError: it does not open, or fails its self-test.
        """
        engine = open_engine("onnxruntime", self._model, 1)
        return self.prove(engine, Accuracy.EXACT, None, "reference")

    def _make_reference(self) -> Vectors:
        proven = self.open_reference()
        try:
            return selftest.embed_golden(proven.embedder, self._model)
        finally:
            proven.close()
