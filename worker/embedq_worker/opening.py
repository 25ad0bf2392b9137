"""Opens engines and proves them: no engine serves that has not passed its self-test."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from embedq.contract import Accuracy
from embedq.errors import SettingsError
from embedq_worker import canary, references, selftest
from embedq_worker.canary import Canary
from embedq_worker.choices import EngineChoice, PrecisionChoice
from embedq_worker.embedder import Embedder
from embedq_worker.engines import open_engine
from embedq_worker.engines.base import Engine
from embedq_worker.errors import EngineError, Reason
from embedq_worker.golden import GOLDEN
from embedq_worker.measuring import race
from embedq_worker.models import Model
from embedq_worker.references import Vectors
from embedq_worker.selection import Candidate, Memory, candidates, choose, machine_key
from embedq_worker.serving import Proven
from embedq_worker.settings import WorkerSettings
from embedq_worker.tokenization import Tokenizer

log = logging.getLogger("embedq.worker")

#: Padded tokens of one inference, where the settings name none; why: see engines/onnxruntime.py.
DEFAULT_TOKEN_BUDGET: Final = 512


class Opener:
    """Opens engines for one model by the settings of a node."""

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self._settings = settings
        self._model = model
        self._tokenizer = Tokenizer(model.tokenizer_path, model.max_length)

    def open_npu(self) -> Proven:
        """Open the NPU, or its stand-in, with a canary in every batch.

        Raises:
            ModelError, DeviceError, EngineError: it does not open, or fails its self-test.
        """
        # Imported where chosen: the runtime belongs into the child that serves with it.
        from embedq_worker.engines.openvino_npu import NpuOptions, open_npu
        from embedq_worker.engines.target import TARGETS

        settings = self._settings
        if settings.precision is PrecisionChoice.INT8:
            raise SettingsError("EMBEDQ_PRECISION=int8 needs a quantised model. Use auto.")
        options = NpuOptions(
            target=TARGETS[settings.npu_standin],
            row_tokens=settings.row_tokens,
            requests=settings.npu_requests,
            binding=settings.npu_binding,
            commandlist_mode=str(settings.npu_commandlist_mode or ""),
            properties=settings.npu_properties,
            compile_deadline_s=settings.compile_deadline_s,
            infer_deadline_s=settings.infer_deadline_s,
        )
        reference = self._reference()
        engine = open_npu(self._model, options, settings.cache_dir)
        proven = self.prove(engine, Accuracy.STANDARD, reference, "only")
        tokens = self._tokenizer.tokenize([canary.TEXT])
        proven.embedder.canary = Canary(tokens, reference[GOLDEN.index(canary.TEXT)])
        return proven

    def open_cpu(self, accuracy: Accuracy) -> Proven:
        """Open the engine for an accuracy class on this CPU: pinned, kept, or measured now.

        Raises:
            SettingsError: the settings leave none.
            ModelError, EngineError: none opens and passes its self-test.
        """
        settings = self._settings
        has_openvino = importlib.util.find_spec("openvino") is not None
        among = candidates(accuracy, settings.engine, settings.precision, has_openvino=has_openvino)
        if not among:
            raise SettingsError(
                f"EMBEDQ_ENGINE={settings.engine} and EMBEDQ_PRECISION={settings.precision}: no "
                "engine of this machine computes so. Set both to auto."
            )
        memory = Memory(settings.cache_dir)
        measure = functools.partial(self._measure, accuracy)
        chosen, why = choose(among, self._key(accuracy, among), memory, measure)
        log.info(
            "engine_chosen accuracy=%s engine=%s precision=%s why=%s",
            accuracy,
            chosen.engine,
            chosen.precision,
            why,
        )
        return self._open_first([chosen, *(one for one in among if one != chosen)], accuracy, why)

    def prove(
        self, engine: Engine, accuracy: Accuracy, reference: Vectors | None, why: str
    ) -> Proven:
        """Ask an engine the golden texts; one that fails is closed.

        Raises:
            EngineError: it fails.
        """
        budget = self._settings.token_budget or DEFAULT_TOKEN_BUDGET
        embedder = Embedder(self._tokenizer, engine, token_budget=budget)
        report = selftest.run(embedder, self._model, reference, accuracy)
        proven = Proven(engine, embedder, report, why)
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

    def _open_first(self, among: Sequence[Candidate], accuracy: Accuracy, why: str) -> Proven:
        """Open the first that can be proven; the others are there for when it cannot."""
        for one in among[:-1]:
            try:
                return self._open(one, accuracy, why)
            except EngineError as error:
                log.warning("engine_refused engine=%s reason=%s", one.engine, error)
                why = "fallback"
        return self._open(among[-1], accuracy, why)

    def _open(self, one: Candidate, accuracy: Accuracy, why: str) -> Proven:
        trusted = one.engine is EngineChoice.ONNXRUNTIME
        reference = None if trusted else self._reference()
        engine = open_engine(one.engine, self._model, self._settings.cores(), one.precision)
        return self.prove(engine, accuracy, reference, why)

    def _reference(self) -> Vectors:
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

    def _measure(self, accuracy: Accuracy, among: Sequence[Candidate]) -> Mapping[Candidate, float]:
        """Time those that can be proven for a class."""
        opened: dict[Candidate, Proven] = {}
        try:
            for one in among:
                try:
                    opened[one] = self._open(one, accuracy, "measured")
                except EngineError as error:
                    log.info("engine_refused engine=%s reason=%s", one.engine, error)
            return race({one: proven.embedder for one, proven in opened.items()}, self._model)
        finally:
            for proven in opened.values():
                proven.close()

    def _key(self, accuracy: Accuracy, among: Sequence[Candidate]) -> str:
        return machine_key(
            model=self._model.identity,
            accuracy=str(accuracy),
            among=str([(str(one.engine), str(one.precision)) for one in among]),
            versions=str([_version(name) for name in ("onnxruntime", "openvino")]),
            cores=str(self._settings.cores()),
            token_budget=str(self._settings.token_budget or DEFAULT_TOKEN_BUDGET),
        )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
