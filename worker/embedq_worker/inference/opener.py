"""Open what a placement asks for.

Opens the engines of a node: none serves that has not been proven.

Serves with the stub, which computes nothing, as if it were a device with a model.

The model and the device that a node was given, opened as what serves with them.

Every process that computes comes through here: a node's child, a probe, and the commands that warm,
check and measure. None of them needs Celery for it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from embedq.errors import SettingsError
from embedq.protocol.contract import Accuracy, Device, Precision
from embedq.testing import stub_vectors
from embedq_worker.device.discovery import verify_opened
from embedq_worker.device.placement import Claim, Placement, claim
from embedq_worker.engines.base import AnyTokenizer, Engine
from embedq_worker.engines.factory import open_engine
from embedq_worker.engines.model_cache import Quantised, QuantisedStore
from embedq_worker.engines.stub import (
    STUB_MAX_LENGTH,
    FaultScript,
    StubEngine,
    StubTokenizer,
    stub_card,
)
from embedq_worker.errors import DeviceError, EngineError, NotQuantised, Reason
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import CANARY_TEXT, Canary, Embedder
from embedq_worker.inference.selection import (
    DEFAULT_TOKEN_BUDGET,
    RACE_VERSION,
    Candidate,
    Layout,
    Layouts,
    Memory,
    candidates,
    choose,
    engine_versions,
    machine_key,
    race,
)
from embedq_worker.inference.selftest import GOLDEN
from embedq_worker.inference.serving import Proven, Serving
from embedq_worker.inference.verifier import Prover, Shadow
from embedq_worker.model import resolve
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import DeviceChoice, EngineChoice, PrecisionChoice, WorkerSettings

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
        from embedq_worker.engines.openvino_runtime import TARGETS

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
        tokens = self.prover.tokenizer.tokenize([CANARY_TEXT])
        proven.embedder.canary = Canary(tokens, reference[GOLDEN.index(CANARY_TEXT)])
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


def serve_stub(settings: WorkerSettings) -> Serving:
    """Serve with the stub; on the CPU, where a degraded one goes, it has no faults.

    Raises:
        EngineError: it fails its self-test.
    """
    _, content = _stub_tokenizer(settings.stub_tokenizer)
    if settings.device is DeviceChoice.CPU:
        sound = _open_stub(settings, Device.CPU)
        return Serving(stub_card(content), sound, lambda: sound, lambda: sound)
    script = FaultScript(settings.stub_faults) if settings.stub_faults else None
    proven = _open_stub(settings, Device.STUB, script)
    quick = settings.model_copy(update={"stub_delay_s": 0.0, "stub_texts_per_s": 0.0})
    shadow = Shadow(settings.shadow_every, lambda: _open_stub(quick, Device.CPU))
    return Serving(stub_card(content), proven, lambda: proven, lambda: proven, shadow)


def _open_stub(
    settings: WorkerSettings, device: Device, script: FaultScript | None = None
) -> Proven:
    engine = StubEngine(
        delay_s=settings.stub_delay_s,
        texts_per_s=settings.stub_texts_per_s,
        script=script,
        device=device,
    )
    budget = settings.token_budget or DEFAULT_TOKEN_BUDGET
    tokenizer, content = _stub_tokenizer(settings.stub_tokenizer)
    embedder = Embedder(tokenizer, engine, token_budget=budget)
    # Real tokens give the stub other hashes than those of the words that it is known by.
    report = selftest.run(embedder, None, None if content else stub_vectors(GOLDEN))
    if not report.passed:
        raise EngineError(f"The self-test failed: {report.reason}", Reason.SELFTEST_FAILED)
    return Proven(engine, embedder, report, "only")


def _stub_tokenizer(path: Path | None) -> tuple[AnyTokenizer, bytes]:
    if path is None:
        return StubTokenizer(), b""
    from embedq_worker.inference.tokenizer import (
        Tokenizer,  # a library that the stub alone does not need
    )

    tokenizer = Tokenizer(path, STUB_MAX_LENGTH)
    return tokenizer, path.read_bytes()


#: Seconds that a killed predecessor may take to give its device back.
CLAIM_PATIENCE_S: Final = 10.0


def open_serving(settings: WorkerSettings, model: resolve.Model | None) -> Serving:
    """Open the engine of the device and prove it.

    Raises:
        ModelError: the files of the model are damaged.
        DeviceError: OpenVINO does not see the device.
        EngineError: the engine does not open, or fails its self-test.
    """
    if model is None:
        return serve_stub(settings)
    opener = Opener(settings, model)

    def open_exact() -> Proven:
        return opener.open_cpu(Accuracy.EXACT)

    if settings.device is DeviceChoice.NPU:
        shadow = Shadow(settings.shadow_every, opener.prover.open_reference)
        return Serving(model.card(), opener.open_npu(), open_exact, shadow=shadow)
    name = opener.quantised()
    # By the name that is announced: another copy may be made before a batch asks for it.
    open_int8 = functools.partial(opener.open_int8, name=name) if name else None
    card = replace(model.card(), quantised=name)
    return Serving(card, opener.open_cpu(Accuracy.STANDARD), open_exact, open_int8)


def claim_device(settings: WorkerSettings, placement: Placement) -> Claim | None:
    """Take the NPU of a placement for this process alone.

    Raises:
        DeviceBusy: another process holds it.
    """
    if placement.npu is None:
        return None
    return claim(placement.npu.pci, settings.lock_dir, node=settings.name, wait_s=CLAIM_PATIENCE_S)


def open_placed(
    settings: WorkerSettings, placement: Placement, model: resolve.Model | None = None
) -> Serving:
    """Open and prove the engine on the device of a placement, and on no other.

    Args:
        settings: of the node.
        placement: where.
        model: what to serve; None finds it.

    Raises:
        ModelError, EngineError: as open_serving.
        WrongDevice: the runtime opened another NPU than the one of the placement.
    """
    placed = settings.model_copy(update={"device": DeviceChoice(str(placement.device))})
    opened = open_serving(placed, model or find_model(settings))
    engine = opened.standard.engine
    if engine.device is not placement.device:
        opened.close()
        raise EngineError(
            f"The engine {engine.name} runs on {engine.device}, not on {placement.device}."
        )
    if placement.npu is not None:
        try:
            verify_opened(placement.npu, engine.details.get("device_pci_info", ""))
        except DeviceError:
            opened.close()
            raise
    return opened
