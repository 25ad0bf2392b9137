"""What a worker raises on purpose; a second branch of the tree in embedq.errors.

EmbedqError
├─ ModelError             the model cannot be used                 (fix EMBEDQ_MODEL or its files)
├─ DeviceError            no NPU may be used; the message has the mend  (fix the machine)
│   ├─ NoDevice           there is none, or none that is visible here
│   ├─ SeveralDevices     there are several, and a process cannot choose
│   ├─ DeviceForbidden    this user or container may not open it
│   ├─ DeviceBusy         another process holds it; .holder
│   ├─ WrongDevice        the runtime opened another one
│   └─ NpuUnproven        it failed, and a strict worker has nothing else
└─ EngineError            an engine cannot be trusted              (feeds health, never the caller)
    ├─ CompileFailed      the model could not be prepared for the device
    ├─ InferFailed        an inference raised, or gave a wrong or non-finite vector
    ├─ NotQuantized       there is no quantized model to be trusted for class int8
    └─ DeviceLost         the device is gone, hung or unknown: replace the process
"""

from __future__ import annotations

from enum import StrEnum

from embedq.errors import EmbedqError


class ModelError(EmbedqError):
    """The model is missing, damaged or of a kind we cannot build."""

    code = "bad_model"


class DeviceError(EmbedqError):
    """No NPU may be used here; trying again changes nothing."""

    code = "no_device"


class NoDevice(DeviceError):
    """There is no NPU, or none that is visible to this process."""


class SeveralDevices(DeviceError):
    """Several NPUs are visible, and a process cannot choose among them."""

    code = "several_devices"


class DeviceForbidden(DeviceError):
    """This user or container may not open the NPU."""

    code = "device_forbidden"


class DeviceBusy(DeviceError):
    """Another process holds the NPU.

    Attributes:
        holder: what it wrote into the lock, `pid host worker`.
    """

    code = "device_busy"

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class WrongDevice(DeviceError):
    """The runtime opened another NPU than the one that this process holds."""

    code = "wrong_device"


class NpuUnproven(DeviceError):
    """The NPU of a strict worker could not be proven, and nothing else may serve."""

    code = "npu_unproven"


class FailureReason(StrEnum):
    """Why an engine cannot be trusted: one word for log, wire and metric."""

    ENGINE_FAILED = "engine_failed"
    NPU_UNPROVEN = "npu_unproven"
    COMPILE_FAILED = "compile_failed"
    INFER_FAILED = "infer_failed"
    DEVICE_LOST = "device_lost"
    DEVICE_UNKNOWN = "device_unknown"
    DEVICE_ERROR = "device_error"
    OUT_OF_MEMORY = "out_of_memory"
    DEADLINE = "deadline"
    NOT_FINITE = "not_finite"
    WRONG_CANARY = "wrong_canary"
    SELFTEST_FAILED = "selftest_failed"
    COMPILE_REFUSED = "compile_refused"
    COMPILE_CRASHED = "compile_crashed"
    COMPILE_DEADLINE = "compile_deadline"
    CACHE_ENTRY_INVALID = "cache_entry_invalid"
    NO_COMPILER = "no_compiler"
    SHADOW_MISMATCH = "shadow_mismatch"
    SLOW = "slow"
    INIT_FAILED = "init_failed"
    INIT_TIMEOUT = "init_timeout"
    CRASH_LOOP = "crash_loop"
    OPERATOR = "operator"
    DRIVER_MISMATCH = "driver_mismatch"
    NOT_QUANTIZED = "not_quantized"


class EngineError(EmbedqError):
    """An engine cannot be trusted.

    Attributes:
        reason: why, in a word.
    """

    code = "engine_failed"

    def __init__(self, message: str, reason: FailureReason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or FailureReason(self.code)


class CompileFailed(EngineError):
    """The model could not be prepared for the device."""

    code = "compile_failed"


class InferFailed(EngineError):
    """An inference raised, or gave a wrong or non-finite vector."""

    code = "infer_failed"


class NotQuantized(EngineError):
    """There is no quantized model, or none to be trusted, for class ``int8``."""

    code = "not_quantized"


class DeviceLost(EngineError):
    """The device is gone, hung or in an unknown state; only a new process can use it."""

    code = "device_lost"


def describe(error: BaseException, otherwise: FailureReason) -> tuple[str, str]:
    """Return the code and a sentence of an error; one that is not ours may quote a text."""
    if isinstance(error, EngineError):
        return str(error.reason), str(error)
    if isinstance(error, EmbedqError):
        return error.code, str(error)
    return str(otherwise), type(error).__name__
