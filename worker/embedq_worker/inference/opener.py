"""Open what a placement asks for.

Opens the engines of a worker: none serves that has not been proven.

Serves with the stub, which computes nothing, as if it were a device with a model.

The model and the device that a worker was given, opened as what serves with them.

Every process that computes comes through here: a worker's child, a probe, and the commands that
warm, check and measure. None of them needs Celery for it.
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
from embedq.protocol.worker import ModelInfo
from embedq.testing import stub_vectors
from embedq_worker.device.discovery import verify_opened
from embedq_worker.device.placement import DeviceLock, Placement, acquire, choose_placement
from embedq_worker.engines.base import AnyTokenizer, Engine
from embedq_worker.engines.factory import open_engine
from embedq_worker.engines.model_cache import QuantizedModel, QuantizedModelStore
from embedq_worker.engines.stub import (
    STUB_MAX_LENGTH,
    FaultScript,
    StubEngine,
    StubTokenizer,
    stub_model_info,
)
from embedq_worker.errors import DeviceError, EngineError, FailureReason, NoDevice, NotQuantized
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import CANARY_TEXT, Canary, Embedder
from embedq_worker.inference.selection import (
    BENCHMARK_VERSION,
    DEFAULT_TOKEN_BUDGET,
    Candidate,
    CpuConfig,
    TuningCache,
    benchmark,
    candidates,
    choose,
    engine_versions,
    machine_key,
)
from embedq_worker.inference.selftest import GOLDEN
from embedq_worker.inference.serving import EngineSet, VerifiedEngine
from embedq_worker.inference.verifier import EngineVerifier, ShadowCheck
from embedq_worker.model import resolve
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import DeviceChoice, EngineChoice, PrecisionChoice, WorkerSettings

log = logging.getLogger(__name__)


#: What makes a quantized copy.
QUANTIZE: Final = "Run on this worker: embedq-worker quantize FILE, and start it again."


class EngineOpener:
    """Opens engines for one model by the settings of a worker.

    Attributes:
        prover: proves what is opened.
    """

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self._settings = settings
        self._model = model
        self.prover = EngineVerifier(settings, model)
        self._layout = CpuConfig.from_settings(settings)

    def open_npu(self) -> VerifiedEngine:
        """Open the NPU, or an emulated NPU, with a canary in every batch.

        Raises:
            ModelError, DeviceError, EngineError: it does not open, or fails its self-test.
        """
        # Imported where chosen: the runtime belongs into the child that serves with it.
        from embedq_worker.engines.openvino_npu import NpuOptions, open_npu
        from embedq_worker.engines.openvino_runtime import TARGETS

        settings = self._settings
        if settings.precision is PrecisionChoice.INT8:
            raise SettingsError("EMBEDQ_PRECISION=int8 needs a quantized model. Use auto.")
        options = NpuOptions(
            target=TARGETS[settings.npu_emulation],
            requests=settings.npu_requests,
            commandlist_mode=str(settings.npu_commandlist_mode or ""),
            properties=settings.npu_properties,
            compile_timeout_s=settings.compile_timeout_s,
            infer_timeout_s=settings.infer_timeout_s,
        )
        reference = self.prover.reference()
        engine = open_npu(self._model, options, settings.cache_dir)
        proven = self.prover.verify(engine, Accuracy.STANDARD, reference, "only")
        tokens = self.prover.tokenizer.tokenize([CANARY_TEXT])
        proven.embedder.canary = Canary(tokens, reference[GOLDEN.index(CANARY_TEXT)])
        return proven

    def open_cpu(self, accuracy: Accuracy) -> VerifiedEngine:
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
                    "beside what the worker computes otherwise. Set EMBEDQ_PRECISION to auto."
                )
            raise SettingsError(
                f"EMBEDQ_ENGINE={settings.engine} and EMBEDQ_PRECISION={settings.precision}: no "
                "engine of this machine computes so. Set both to auto."
            )
        memory = TuningCache(settings.cache_dir)
        measure = functools.partial(self._measure, accuracy)
        chosen, why = choose(among, self._key(accuracy, among), memory, measure)
        log.info(
            "engine_chosen accuracy=%s engine=%s precision=%s why=%s layout=%r",
            accuracy,
            chosen.engine,
            chosen.precision,
            why,
            self._layout.describe(),
        )
        return self._open_first([chosen, *(one for one in among if one != chosen)], accuracy, why)

    def quantized(self) -> str:
        """Name the quantized copy that class ``int8`` would be served with; empty for none."""
        if importlib.util.find_spec("openvino") is None:
            return ""
        return QuantizedModelStore(self._settings.cache_dir, self._model).current()

    def open_int8(self, quantized: QuantizedModel | None = None, name: str = "") -> VerifiedEngine:
        """Open the quantized copy of the model.

        Args:
            quantized: the copy; None for the one that is kept.
            name: that the copy which is kept must have; empty for any.

        Raises:
            NotQuantized: none is kept, or it does not open or fails its self-test.
            ModelError: the files of the model are damaged.
        """
        copy = quantized or self._kept(name)
        try:
            if importlib.util.find_spec("openvino") is None:
                raise NotQuantized("Class int8 needs OpenVINO. Run: pip install 'embedq[npu]'")
            layout = self._layout
            engine = open_engine(
                "openvino", self._model, layout.cores, Precision.INT8, copy.graph, layout.streams
            )
            why = f"quantized {copy.name}"
            return self.prover.verify(engine, Accuracy.INT8, self.prover.reference(), why, layout)
        except NotQuantized:
            raise
        except EngineError as error:
            raise NotQuantized(f"The quantized copy cannot serve: {error} {QUANTIZE}") from error

    def _kept(self, name: str = "") -> QuantizedModel:
        copy = QuantizedModelStore(self._settings.cache_dir, self._model).load(name)
        if copy is not None:
            return copy
        if name:
            raise NotQuantized(
                f"The quantized copy {name} of {self._model.label}, which this worker announced, "
                f"is "
                "damaged, or another has taken its place. Start the worker again, or quantize "
                "again."
            )
        raise NotQuantized(f"There is no quantized copy of {self._model.label}. {QUANTIZE}")

    def _open_first(
        self, among: Sequence[Candidate], accuracy: Accuracy, why: str
    ) -> VerifiedEngine:
        """Open the first that can be proven; the others are there for when it cannot."""
        for one in among[:-1]:
            try:
                return self._open(one, accuracy, why)
            except EngineError as error:
                log.warning("engine_rejected engine=%s reason=%s", one.engine, error)
                why = "fallback"
        return self._open(among[-1], accuracy, why)

    def _open(self, one: Candidate, accuracy: Accuracy, why: str) -> VerifiedEngine:
        trusted = one.engine is EngineChoice.ONNXRUNTIME
        reference = None if trusted else self.prover.reference()
        layout = self._layout
        engine = open_engine(
            one.engine, self._model, layout.cores, one.precision, streams=layout.streams
        )
        return self.prover.verify(engine, accuracy, reference, why, layout)

    def _measure(self, accuracy: Accuracy, among: Sequence[Candidate]) -> Mapping[Candidate, float]:
        """Time those that can be proven for a class."""
        opened: dict[Candidate, VerifiedEngine] = {}
        try:
            for one in among:
                try:
                    opened[one] = self._open(one, accuracy, "measured")
                except EngineError as error:
                    log.info("engine_rejected engine=%s reason=%s", one.engine, error)
            return benchmark({one: proven.embedder for one, proven in opened.items()}, self._model)
        finally:
            for proven in opened.values():
                proven.close()

    def _key(self, accuracy: Accuracy, among: Sequence[Candidate]) -> str:
        return machine_key(
            race=str(BENCHMARK_VERSION),
            model=self._model.identity,
            accuracy=str(accuracy),
            among=str([(str(one.engine), str(one.precision)) for one in among]),
            versions=engine_versions(),
            cores=str(self._settings.cores()),
            token_budget=str(self._settings.token_budget or DEFAULT_TOKEN_BUDGET),
        )


def serve_stub(settings: WorkerSettings) -> EngineSet:
    """Serve with the stub; on the CPU, where a degraded one goes, it has no faults.

    Raises:
        EngineError: it fails its self-test.
    """
    _, content = _stub_tokenizer(settings.stub_tokenizer)
    if settings.device is DeviceChoice.CPU:
        sound = _open_stub(settings, Device.CPU)
        return EngineSet(stub_model_info(content), sound, lambda: sound, lambda: sound)
    script = FaultScript(settings.stub_faults) if settings.stub_faults else None
    proven = _open_stub(settings, Device.STUB, script)
    quick = settings.model_copy(update={"stub_delay_s": 0.0, "stub_texts_per_s": 0.0})
    shadow = ShadowCheck(settings.shadow_check_every, lambda: _open_stub(quick, Device.CPU))
    return EngineSet(stub_model_info(content), proven, lambda: proven, lambda: proven, shadow)


def _open_stub(
    settings: WorkerSettings, device: Device, script: FaultScript | None = None
) -> VerifiedEngine:
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
        raise EngineError(f"The self-test failed: {report.reason}", FailureReason.SELFTEST_FAILED)
    return VerifiedEngine(engine, embedder, report, "only")


def _stub_tokenizer(path: Path | None) -> tuple[AnyTokenizer, bytes]:
    if path is None:
        return StubTokenizer(), b""
    from embedq_worker.inference.tokenizer import (
        Tokenizer,  # a library that the stub alone does not need
    )

    tokenizer = Tokenizer(path, STUB_MAX_LENGTH)
    return tokenizer, path.read_bytes()


#: Seconds that a killed predecessor may take to give its device back.
LOCK_TIMEOUT_S: Final = 10.0


def open_serving(settings: WorkerSettings, model: resolve.Model | None) -> EngineSet:
    """Open the engine of the device and prove it.

    Raises:
        ModelError: the files of the model are damaged.
        DeviceError: OpenVINO does not see the device.
        EngineError: the engine does not open, or fails its self-test.
    """
    if model is None:
        return serve_stub(settings)
    opener = EngineOpener(settings, model)

    def open_exact() -> VerifiedEngine:
        return opener.open_cpu(Accuracy.EXACT)

    if settings.device is DeviceChoice.NPU:
        shadow = ShadowCheck(settings.shadow_check_every, opener.prover.open_reference)
        return EngineSet(model.model_info(), opener.open_npu(), open_exact, shadow=shadow)
    name = opener.quantized()
    # By the name that is announced: another copy may be made before a batch asks for it.
    open_int8 = functools.partial(opener.open_int8, name=name) if name else None
    model_info = replace(model.model_info(), quantized=name)
    return EngineSet(model_info, opener.open_cpu(Accuracy.STANDARD), open_exact, open_int8)


def claim_device(settings: WorkerSettings, placement: Placement) -> DeviceLock | None:
    """Take the NPU of a placement for this process alone.

    Raises:
        DeviceBusy: another process holds it.
    """
    if placement.npu is None:
        return None
    return acquire(
        placement.npu.pci, settings.lock_dir, worker=settings.name, wait_s=LOCK_TIMEOUT_S
    )


def open_placed(
    settings: WorkerSettings, placement: Placement, model: resolve.Model | None = None
) -> EngineSet:
    """Open and prove the engine on the device of a placement, and on no other.

    Args:
        settings: of the worker.
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


def warm(settings: WorkerSettings, *, npu_only: bool) -> tuple[ModelInfo, Engine]:
    """Open and verify the engine once, so that its compiled model is cached, and close it.

    Args:
        settings: of the worker.
        npu_only: refuse to open the CPU in place of an NPU.

    Raises:
        NoDevice: `npu_only`, and there is no NPU.
        DeviceBusy, ModelError, EngineError: as claim_device and open_placed.
    """
    placement = choose_placement(settings, wait_s=LOCK_TIMEOUT_S if npu_only else 0.0)
    if npu_only and placement.assigned_device is not Device.NPU:
        raise NoDevice(placement.reason)
    lock = claim_device(settings, placement)
    try:
        opened = open_placed(settings, placement)
        opened.close()
        return opened.model_info, opened.standard.engine
    finally:
        if lock is not None:
            lock.release()
