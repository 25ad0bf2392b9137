"""Opens the engines of a node: none serves that has not been proven."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Final

from embedq.contract import Accuracy, Precision
from embedq.errors import SettingsError
from embedq_worker import canary
from embedq_worker.canary import Canary
from embedq_worker.choices import EngineChoice, PrecisionChoice
from embedq_worker.engines import open_engine
from embedq_worker.engines.base import Engine
from embedq_worker.errors import EngineError, NotQuantised
from embedq_worker.golden import GOLDEN
from embedq_worker.layouts import DEFAULT_TOKEN_BUDGET, Layouts, engine_versions
from embedq_worker.measuring import RACE_VERSION, race
from embedq_worker.models import Model
from embedq_worker.proving import Prover
from embedq_worker.quantised import Quantised, QuantisedStore
from embedq_worker.selection import Candidate, Memory, candidates, choose, machine_key
from embedq_worker.serving import Proven
from embedq_worker.settings import WorkerSettings
from embedq_worker.tuning import Layout

log = logging.getLogger("embedq.worker")

#: What makes a quantised copy.
QUANTIZE: Final = "Run on this node: embedq-worker quantize FILE, and start it again."
#: What serves class int8.
INT8: Final = Candidate(EngineChoice.OPENVINO, Precision.INT8)


class Opener:
    """Opens engines for one model by the settings of a node.

    Attributes:
        prover: proves what is opened.
    """

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self._settings = settings
        self._model = model
        self.prover = Prover(settings, model)
        self._layouts = Layouts(settings, model)

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
        reference = self.prover.reference()
        engine = open_npu(self._model, options, settings.cache_dir)
        proven = self.prover.prove(engine, Accuracy.STANDARD, reference, "only")
        tokens = self.prover.tokenizer.tokenize([canary.TEXT])
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
            if settings.precision is PrecisionChoice.INT8:
                raise SettingsError(
                    "EMBEDQ_PRECISION=int8: int8 is a class that a job asks for (--accuracy int8), "
                    "beside what the node computes otherwise. Set EMBEDQ_PRECISION to auto."
                )
            raise SettingsError(
                f"EMBEDQ_ENGINE={settings.engine} and EMBEDQ_PRECISION={settings.precision}: no "
                "engine of this machine computes so. Set both to auto."
            )
        memory = Memory(settings.cache_dir)
        measure = functools.partial(self._measure, accuracy)
        chosen, why = choose(among, self._key(accuracy, among), memory, measure)
        log.info(
            "engine_chosen accuracy=%s engine=%s precision=%s why=%s layout=%r",
            accuracy,
            chosen.engine,
            chosen.precision,
            why,
            self._layouts.of(chosen, accuracy).describe(),
        )
        return self._open_first([chosen, *(one for one in among if one != chosen)], accuracy, why)

    def quantised(self) -> str:
        """Name the quantised copy that class ``int8`` would be served with; empty for none."""
        if importlib.util.find_spec("openvino") is None:
            return ""
        return QuantisedStore(self._settings.cache_dir, self._model).current()

    def open_int8(self, quantised: Quantised | None = None, name: str = "") -> Proven:
        """Open the quantised copy of the model.

        Args:
            quantised: the copy; None for the one that is kept.
            name: that the copy which is kept must have; empty for any.

        Raises:
            NotQuantised: none is kept, or it does not open or fails its self-test.
            ModelError: the files of the model are damaged.
        """
        copy = quantised or self._kept(name)
        try:
            if importlib.util.find_spec("openvino") is None:
                raise NotQuantised("Class int8 needs OpenVINO. Run: pip install 'embedq[npu]'")
            layout = self._layouts.of(INT8, Accuracy.INT8)
            engine = open_engine(
                "openvino", self._model, layout.cores, Precision.INT8, copy.graph, layout.streams
            )
            why = f"quantised {copy.name}"
            return self.prover.prove(engine, Accuracy.INT8, self.prover.reference(), why, layout)
        except NotQuantised:
            raise
        except EngineError as error:
            raise NotQuantised(f"The quantised copy cannot serve: {error} {QUANTIZE}") from error

    def _kept(self, name: str = "") -> Quantised:
        copy = QuantisedStore(self._settings.cache_dir, self._model).load(name)
        if copy is not None:
            return copy
        if name:
            raise NotQuantised(
                f"The quantised copy {name} of {self._model.label}, which this node announced, is "
                "damaged, or another has taken its place. Start the node again, or quantise again."
            )
        raise NotQuantised(f"There is no quantised copy of {self._model.label}. {QUANTIZE}")

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
        reference = None if trusted else self.prover.reference()
        layout = self._layouts.of(one, accuracy)
        engine = open_engine(
            one.engine, self._model, layout.cores, one.precision, streams=layout.streams
        )
        return self.prover.prove(engine, accuracy, reference, why, layout)

    def open_layout(self, one: Candidate, layout: Layout) -> Engine:
        """Open an engine with a layout that is to be measured; it is not proven.

        Raises:
            NotQuantised, ModelError, EngineError: it does not open.
        """
        graph = self._kept().graph if one.precision is Precision.INT8 else None
        return open_engine(
            one.engine, self._model, layout.cores, one.precision, graph, layout.streams
        )

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
            race=str(RACE_VERSION),
            model=self._model.identity,
            accuracy=str(accuracy),
            among=str([(str(one.engine), str(one.precision)) for one in among]),
            versions=engine_versions(),
            cores=str(self._settings.cores()),
            token_budget=str(self._settings.token_budget or DEFAULT_TOKEN_BUDGET),
        )
