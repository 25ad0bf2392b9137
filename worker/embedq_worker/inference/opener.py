"""Open and verify the engines of a worker on the device of its placement.

Pool processes, probes and the commands that warm and check open engines here. No Celery enters.
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
from embedq_worker.device.placement import DeviceLock, Placement, acquire, choose_placement
from embedq_worker.engines.base import AnyTokenizer
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
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import DeviceChoice, EngineChoice, PrecisionChoice, WorkerSettings

log = logging.getLogger(__name__)

#: Part of an error message: why int8 is not a precision of a worker.
INT8_IS_A_CLASS: Final = (
    "int8 is an accuracy class that a job requests (--accuracy int8). Set EMBEDQ_PRECISION to auto."
)

#: Part of an error message: how to get a quantized model.
QUANTIZE: Final = "Run embedq-worker quantize FILE on this worker, then restart it."


class EngineOpener:
    """Opens engines for one model by the settings of a worker.

    Attributes:
        verifier: verifies every engine that is opened.
    """

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self._settings = settings
        self._model = model
        self.verifier = EngineVerifier(settings, model)
        self._cpu_config = CpuConfig.from_settings(settings)

    def open_npu(self) -> VerifiedEngine:
        """Open the NPU, or an emulated NPU, with a canary in every batch.

        Raises:
            ModelError, DeviceError, EngineError: it does not open, or fails its self-test.
        """
        # Imported here, because only the process that serves may load the runtime.
        from embedq_worker.engines.openvino_npu import open_npu

        settings = self._settings
        if settings.precision is PrecisionChoice.INT8:
            raise SettingsError(f"EMBEDQ_PRECISION=int8 on an NPU: {INT8_IS_A_CLASS}")
        reference = self.verifier.reference()
        engine = open_npu(self._model, settings)
        verified = self.verifier.verify(engine, Accuracy.STANDARD, reference, "only")
        tokens = self.verifier.tokenizer.tokenize([CANARY_TEXT])
        verified.embedder.canary = Canary(tokens, reference[GOLDEN.index(CANARY_TEXT)])
        return verified

    def open_cpu(self, accuracy: Accuracy) -> VerifiedEngine:
        """Open the CPU engine for an accuracy class: set, cached, or the fastest measured now.

        Raises:
            SettingsError: no engine matches the settings.
            ModelError, EngineError: no engine opens and passes its self-test.
        """
        settings = self._settings
        has_openvino = importlib.util.find_spec("openvino") is not None
        found = candidates(accuracy, settings.engine, settings.precision, has_openvino=has_openvino)
        if not found:
            if settings.precision is PrecisionChoice.INT8:
                raise SettingsError(f"EMBEDQ_PRECISION=int8: {INT8_IS_A_CLASS}")
            raise SettingsError(
                f"EMBEDQ_ENGINE={settings.engine} and EMBEDQ_PRECISION={settings.precision}: no "
                "installed engine supports this. Set both to auto."
            )
        cache = TuningCache(settings.cache_dir)
        measure = functools.partial(self._measure, accuracy)
        chosen, why = choose(found, self._key(accuracy, found), cache, measure)
        log.info(
            "engine_chosen accuracy=%s engine=%s precision=%s why=%s cpu_config=%r",
            accuracy,
            chosen.engine,
            chosen.precision,
            why,
            self._cpu_config.describe(),
        )
        fallbacks = [candidate for candidate in found if candidate != chosen]
        return self._open_first([chosen, *fallbacks], accuracy, why)

    def quantized(self) -> str:
        """Return the name of the quantized model for class ``int8``; empty if there is none."""
        if importlib.util.find_spec("openvino") is None:
            return ""
        return QuantizedModelStore(self._settings.cache_dir, self._model).current()

    def open_int8(self, quantized: QuantizedModel | None = None, name: str = "") -> VerifiedEngine:
        """Open the quantized model.

        Args:
            quantized: quantized model; None = from the cache.
            name: name that the cached one must have; empty = any.

        Raises:
            NotQuantized: there is none, or it does not open or fails its self-test.
            ModelError: the files of the model are damaged.
        """
        quantized = quantized or self._load_quantized(name)
        try:
            if importlib.util.find_spec("openvino") is None:
                raise NotQuantized("Class int8 needs OpenVINO. Run: pip install 'embedq[npu]'")
            config = self._cpu_config
            engine = open_engine(
                "openvino",
                self._model,
                config.cores,
                Precision.INT8,
                quantized.graph,
                config.streams,
            )
            why = f"quantized {quantized.name}"
            return self.verifier.verify(
                engine, Accuracy.INT8, self.verifier.reference(), why, config
            )
        except NotQuantized:
            raise
        except EngineError as error:
            raise NotQuantized(f"The quantized model cannot serve: {error} {QUANTIZE}") from error

    def _load_quantized(self, name: str) -> QuantizedModel:
        found = QuantizedModelStore(self._settings.cache_dir, self._model).load(name)
        if found is not None:
            return found
        if name:
            raise NotQuantized(
                f"Quantized model {name} of {self._model.label}, which this worker announced, is "
                "damaged or was replaced. Restart the worker, or quantize again."
            )
        raise NotQuantized(f"There is no quantized model of {self._model.label}. {QUANTIZE}")

    def _open_first(
        self, found: Sequence[Candidate], accuracy: Accuracy, why: str
    ) -> VerifiedEngine:
        for candidate in found[:-1]:
            try:
                return self._open(candidate, accuracy, why)
            except EngineError as error:
                log.warning("engine_rejected engine=%s reason=%s", candidate.engine, error)
                why = "fallback"
        return self._open(found[-1], accuracy, why)

    def _open(self, candidate: Candidate, accuracy: Accuracy, why: str) -> VerifiedEngine:
        is_reference = candidate.engine is EngineChoice.ONNXRUNTIME
        reference = None if is_reference else self.verifier.reference()
        config = self._cpu_config
        engine = open_engine(
            candidate.engine, self._model, config.cores, candidate.precision, streams=config.streams
        )
        return self.verifier.verify(engine, accuracy, reference, why, config)

    def _measure(self, accuracy: Accuracy, found: Sequence[Candidate]) -> Mapping[Candidate, float]:
        opened: dict[Candidate, VerifiedEngine] = {}
        try:
            for candidate in found:
                try:
                    opened[candidate] = self._open(candidate, accuracy, "measured")
                except EngineError as error:
                    log.info("engine_rejected engine=%s reason=%s", candidate.engine, error)
            embedders = {candidate: verified.embedder for candidate, verified in opened.items()}
            return benchmark(embedders, self._model)
        finally:
            for verified in opened.values():
                verified.close()

    def _key(self, accuracy: Accuracy, found: Sequence[Candidate]) -> str:
        return machine_key(
            benchmark=str(BENCHMARK_VERSION),
            model=self._model.identity,
            accuracy=str(accuracy),
            candidates=str([(str(one.engine), str(one.precision)) for one in found]),
            versions=engine_versions(),
            cores=str(self._cpu_config.cores),
            token_budget=str(self._cpu_config.token_budget),
        )


def serve_stub(settings: WorkerSettings) -> EngineSet:
    """Open the stub engine; with device cpu, the fallback of a degraded worker, without faults.

    Raises:
        EngineError: it fails its self-test.
    """
    _, content = _stub_tokenizer(settings.stub_tokenizer)
    if settings.device is DeviceChoice.CPU:
        on_cpu = _open_stub(settings, Device.CPU)
        return EngineSet(stub_model_info(content), on_cpu, lambda: on_cpu, lambda: on_cpu)
    script = FaultScript(settings.stub_faults) if settings.stub_faults else None
    verified = _open_stub(settings, Device.STUB, script)
    quick = settings.model_copy(update={"stub_delay_s": 0.0, "stub_texts_per_s": 0.0})
    shadow = ShadowCheck(settings.shadow_check_every, lambda: _open_stub(quick, Device.CPU))
    return EngineSet(stub_model_info(content), verified, lambda: verified, lambda: verified, shadow)


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
    # With a real tokenizer, the stub hashes other tokens than stub_vectors does.
    report = selftest.run(embedder, None, None if content else stub_vectors(GOLDEN))
    if not report.passed:
        raise EngineError(f"The self-test failed: {report.reason}", FailureReason.SELFTEST_FAILED)
    return VerifiedEngine(engine, embedder, report, "only")


def _stub_tokenizer(path: Path | None) -> tuple[AnyTokenizer, bytes]:
    if path is None:
        return StubTokenizer(), b""
    from embedq_worker.inference.tokenizer import Tokenizer  # the stub alone needs no tokenizers

    tokenizer = Tokenizer(path, STUB_MAX_LENGTH)
    return tokenizer, path.read_bytes()


#: Timeout for the device lock, which a killed pool process may still hold, seconds.
LOCK_TIMEOUT_S: Final = 10.0


def open_serving(settings: WorkerSettings, model: Model | None) -> EngineSet:
    """Open and verify the engine for the device of the settings.

    Args:
        settings: worker's settings, with the device to use.
        model: model to serve; None for the stub.

    Raises:
        ModelError: the files of the model are damaged.
        DeviceError: OpenVINO does not find the device.
        EngineError: the engine does not open, or fails its self-test.
    """
    if model is None:
        return serve_stub(settings)
    opener = EngineOpener(settings, model)

    def open_exact() -> VerifiedEngine:
        return opener.open_cpu(Accuracy.EXACT)

    if settings.device is DeviceChoice.NPU:
        shadow = ShadowCheck(settings.shadow_check_every, opener.verifier.open_reference)
        return EngineSet(model.model_info(), opener.open_npu(), open_exact, shadow=shadow)
    name = opener.quantized()
    # By the announced name: the cached model may be replaced before the first int8 batch.
    open_int8 = functools.partial(opener.open_int8, name=name) if name else None
    model_info = replace(model.model_info(), quantized=name)
    return EngineSet(model_info, opener.open_cpu(Accuracy.STANDARD), open_exact, open_int8)


def claim_device(settings: WorkerSettings, placement: Placement) -> DeviceLock | None:
    """Lock the NPU of a placement for this process; None if the placement has no NPU.

    Raises:
        DeviceBusy: another process holds the lock.
    """
    if placement.npu is None:
        return None
    return acquire(
        placement.npu.pci, settings.lock_dir, worker=settings.name, wait_s=LOCK_TIMEOUT_S
    )


def open_placed(
    settings: WorkerSettings, placement: Placement, model: Model | None = None
) -> EngineSet:
    """Open and verify the engine on the device of a placement, and on no other.

    Args:
        settings: worker's settings.
        placement: device to use.
        model: model to serve; None = the model of the settings.

    Raises:
        ModelError, EngineError: as for open_serving.
        WrongDevice: the runtime opened another NPU.
    """
    placed = settings.model_copy(update={"device": DeviceChoice(str(placement.device))})
    opened = open_serving(placed, model or find_model(settings, placement.assigned_device))
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


def open_once(
    settings: WorkerSettings, model: Model | None = None, *, npu_only: bool = False
) -> tuple[EngineSet, Placement]:
    """Choose and lock the device, open and verify the engine, and close both again.

    Its compiled model is then cached. What was closed still has its details and its report.

    Args:
        settings: worker's settings.
        model: model to open; None = the model of the settings.
        npu_only: fail instead of opening the CPU.

    Raises:
        NoDevice: there is no NPU, with ``npu_only``.
        DeviceBusy, ModelError, EngineError: as for claim_device and open_placed.
    """
    placement = choose_placement(settings, wait_s=LOCK_TIMEOUT_S if npu_only else 0.0)
    if npu_only and placement.assigned_device is not Device.NPU:
        raise NoDevice(placement.reason)
    lock = claim_device(settings, placement)
    try:
        engines = open_placed(settings, placement, model)
        engines.close()
        return engines, placement
    finally:
        if lock is not None:
            lock.release()
