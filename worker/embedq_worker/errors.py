"""Errors of a worker, a branch of the tree in embedq.errors.

EmbedqError
├─ ModelError             the model cannot be used                 (fix EMBEDQ_MODEL or its files)
├─ DeviceError            no NPU can be used; the message says why (fix the machine)
│   ├─ NoDevice           none exists, or none is visible to this process
│   ├─ SeveralDevices     several are visible; set EMBEDQ_NPU_DEVICE_FILE
│   ├─ DeviceForbidden    this user or container may not open it
│   ├─ DeviceBusy         another process holds its lock; .holder
│   ├─ WrongDevice        the runtime opened another NPU
│   └─ NpuUnverified        the NPU of a strict worker did not pass its self-test
└─ EngineError            an engine failed                         (changes device health)
    ├─ CompileFailed      the model could not be compiled for the device
    ├─ InferFailed        an inference raised an error or returned a wrong vector
    ├─ NotQuantized       no usable quantized model for accuracy class int8
    └─ DeviceLost         the device is lost or hung; the pool process must be replaced
"""

from __future__ import annotations

from enum import StrEnum

from embedq.errors import EmbedqError


class ModelError(EmbedqError):
    """The model is missing, damaged or of an unsupported kind."""

    code = "bad_model"


class DeviceError(EmbedqError):
    """No NPU can be used by this process; a retry does not help."""

    code = "no_device"


class NoDevice(DeviceError):
    """No NPU exists, or none is visible to this process."""


class SeveralDevices(DeviceError):
    """Several NPUs are visible and EMBEDQ_NPU_DEVICE_FILE does not select one."""

    code = "several_devices"


class DeviceForbidden(DeviceError):
    """This user or container may not open the NPU."""

    code = "device_forbidden"


class DeviceBusy(DeviceError):
    """Another process holds the NPU.

    Attributes:
        holder: content of its lock file, `pid host worker`.
    """

    code = "device_busy"

    def __init__(self, message: str, holder: str = "") -> None:
        super().__init__(message)
        self.holder = holder


class WrongDevice(DeviceError):
    """The runtime opened another NPU than the one this process has locked."""

    code = "wrong_device"


class NpuUnverified(DeviceError):
    """The NPU of a strict worker could not be opened or failed its self-test."""

    code = "npu_unverified"


class FailureReason(StrEnum):
    """Why an engine failed; the same word in log, outcome and metric."""

    ENGINE_FAILED = "engine_failed"
    NPU_UNVERIFIED = "npu_unverified"
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
    """An engine failed.

    Attributes:
        reason: why, as a code.
    """

    code = "engine_failed"

    def __init__(self, message: str, reason: FailureReason | None = None) -> None:
        super().__init__(message)
        self.reason = reason or FailureReason(self.code)


class CompileFailed(EngineError):
    """The model could not be compiled for the device."""

    code = "compile_failed"


class InferFailed(EngineError):
    """An inference raised an error or returned a wrong or non-finite vector."""

    code = "infer_failed"


class NotQuantized(EngineError):
    """No usable quantized model exists for accuracy class ``int8``."""

    code = "not_quantized"


class DeviceLost(EngineError):
    """The device is lost, hung or in an unknown state; only a new process can use it."""

    code = "device_lost"


def describe(error: BaseException, otherwise: FailureReason) -> tuple[str, str]:
    """Return the code and message of an error.

    Of an error of another library only the class name: its message may quote a text.

    Args:
        error: what was raised.
        otherwise: code for an error of another library.
    """
    if isinstance(error, EngineError):
        return str(error.reason), str(error)
    if isinstance(error, EmbedqError):
        return error.code, str(error)
    return str(otherwise), type(error).__name__
