"""The words that a node's settings may hold, and which of them exclude each other."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from embedq_worker.settings import WorkerSettings


class DeviceChoice(StrEnum):
    """What a node may be started on."""

    AUTO = "auto"
    NPU = "npu"
    CPU = "cpu"
    STUB = "stub"


class EngineChoice(StrEnum):
    """What may run the model."""

    AUTO = "auto"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


class PrecisionChoice(StrEnum):
    """The arithmetic that an engine may be asked for."""

    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"


class Binding(StrEnum):
    """How tensors reach a request of the NPU."""

    PINNED = "pinned"
    HOST_TENSOR = "host_tensor"
    SHARED = "shared"


class CommandlistMode(StrEnum):
    """The names of OpenVINO pull request 35626."""

    DEFAULT = "DEFAULT"
    FORCE_UPDATE_MUTABLE_COMMANDLIST = "FORCE_UPDATE_MUTABLE_COMMANDLIST"
    FORCE_COMMANDLIST_RECORDING_ONLY = "FORCE_COMMANDLIST_RECORDING_ONLY"


class Standin(StrEnum):
    """What may play the NPU where there is none: for tests and rehearsals."""

    NONE = "none"
    ALIAS = "alias"
    NPUW = "npuw"


class StubDevice(StrEnum):
    """What a stub may play."""

    CPU = "cpu"
    NPU = "npu"


class LogLevel(StrEnum):
    """How much a node says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def contradictions(settings: WorkerSettings) -> Iterator[str]:
    """Yield a sentence for each pair of settings that cannot both be meant."""
    device, engine, precision = settings.device, settings.engine, settings.precision
    stubbed_npu = device is DeviceChoice.STUB and settings.stub_device is StubDevice.NPU
    if settings.strict and not (device in (DeviceChoice.AUTO, DeviceChoice.NPU) or stubbed_npu):
        yield (
            f"EMBEDQ_STRICT and EMBEDQ_DEVICE={device} exclude each other: a strict node computes "
            "on its NPU or not at all. Use EMBEDQ_DEVICE=npu, or unset EMBEDQ_STRICT."
        )
    if device is DeviceChoice.NPU and engine is EngineChoice.ONNXRUNTIME:
        yield (
            "EMBEDQ_ENGINE=onnxruntime and EMBEDQ_DEVICE=npu exclude each other: only openvino "
            "drives an NPU. Unset EMBEDQ_ENGINE, or use EMBEDQ_DEVICE=cpu."
        )
    if device is DeviceChoice.NPU and precision in (PrecisionChoice.F32, PrecisionChoice.BF16):
        yield (
            f"EMBEDQ_PRECISION={precision} and EMBEDQ_DEVICE=npu exclude each other: an NPU "
            "computes in f16. Unset EMBEDQ_PRECISION, or use EMBEDQ_DEVICE=cpu."
        )
    if device is DeviceChoice.CPU and precision is PrecisionChoice.F16:
        yield (
            "EMBEDQ_PRECISION=f16 and EMBEDQ_DEVICE=cpu exclude each other: a CPU computes in f32 "
            "or bf16 here. Use one of these, or EMBEDQ_DEVICE=npu."
        )
    if engine is EngineChoice.ONNXRUNTIME and precision not in (
        PrecisionChoice.AUTO,
        PrecisionChoice.F32,
    ):
        yield (
            f"EMBEDQ_PRECISION={precision} and EMBEDQ_ENGINE=onnxruntime exclude each other: "
            "onnxruntime computes in f32 here. Use EMBEDQ_ENGINE=openvino, or f32."
        )
    if settings.npu_standin is not Standin.NONE and device is not DeviceChoice.NPU:
        yield (
            f"EMBEDQ_NPU_STANDIN={settings.npu_standin} and EMBEDQ_DEVICE={device} exclude each "
            "other: a stand-in plays the NPU. Use EMBEDQ_DEVICE=npu, or unset EMBEDQ_NPU_STANDIN."
        )
    longest_s = settings.visibility_timeout_s / 4
    # A default that does not fit gives way; only a number that somebody chose is a contradiction.
    if "lease_renewal_s" in settings.model_fields_set and settings.lease_renewal_s > longest_s:
        yield (
            f"EMBEDQ_LEASE_RENEWAL_S={settings.lease_renewal_s:g} and EMBEDQ_VISIBILITY_TIMEOUT_S="
            f"{settings.visibility_timeout_s} exclude each other: leases need four renewals in a "
            f"timeout. Use at most {longest_s:g} s, or a longer timeout."
        )
