"""Translate error messages of OpenVINO into EngineErrors with a reason.

Plugins raise plain RuntimeErrors, so only the message identifies the fault. The most stable part
of a message is Level Zero's result: `ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from embedq_worker.errors import CompileFailed, DeviceLost, EngineError, FailureReason, InferFailed

#: Reasons by name of Level Zero's result. The driver returns UNKNOWN and NOT_READY for a context
#: that a reset invalidated, and UNINITIALIZED for that or a full one (linux-npu-driver issue 149).
RESULTS: Final[Mapping[str, FailureReason]] = {
    "DEVICE_LOST": FailureReason.DEVICE_LOST,
    "DEVICE_REQUIRES_RESET": FailureReason.DEVICE_LOST,
    "DEVICE_IN_LOW_POWER_STATE": FailureReason.DEVICE_LOST,
    "UNKNOWN": FailureReason.DEVICE_UNKNOWN,
    "NOT_READY": FailureReason.DEVICE_UNKNOWN,
    "UNINITIALIZED": FailureReason.DEVICE_UNKNOWN,
    "OUT_OF_HOST_MEMORY": FailureReason.OUT_OF_MEMORY,
    "OUT_OF_DEVICE_MEMORY": FailureReason.OUT_OF_MEMORY,
    "INVALID_NATIVE_BINARY": FailureReason.CACHE_ENTRY_INVALID,
    "UNSUPPORTED_VERSION": FailureReason.DRIVER_MISMATCH,
}

#: Names of results by number, for messages without a name.
CODES: Final[Mapping[int, str]] = {
    0x70000001: "DEVICE_LOST",
    0x70000002: "OUT_OF_HOST_MEMORY",
    0x70000003: "OUT_OF_DEVICE_MEMORY",
    0x70000006: "DEVICE_REQUIRES_RESET",
    0x70000007: "DEVICE_IN_LOW_POWER_STATE",
    0x78000001: "UNINITIALIZED",
    0x78000002: "UNSUPPORTED_VERSION",
    0x7800000F: "INVALID_NATIVE_BINARY",
    0x7FFFFFFE: "UNKNOWN",
}

#: Parts of the plugin's messages about a missing compiler.
NO_COMPILER: Final = ("VCL compiler loading failed", "driver compiler requires a valid device")

#: Next step if firmware, driver and compiler do not match (linux-npu-driver issue 28).
FIT_DRIVER: Final = (
    "The driver is too old, or its parts are of different releases: install intel-fw-npu, "
    "intel-level-zero-npu and intel-driver-compiler-npu of one release."
)

#: Reasons after which only a new process can use the device.
LOST: Final = frozenset(
    {FailureReason.DEVICE_LOST, FailureReason.DEVICE_UNKNOWN, FailureReason.DEADLINE}
)

_NAME = re.compile(r"ZE_RESULT_(?:ERROR_)?([A-Z][A-Z_]*[A-Z])")
_CODE = re.compile(r"\b0x7[0-9a-fA-F]{7}\b")


def reason_of(text: str) -> FailureReason:
    """Find the reason in an error message; DEVICE_ERROR if the message is unknown."""
    names = _NAME.findall(text) or [
        CODES[int(code, 16)] for code in _CODE.findall(text) if int(code, 16) in CODES
    ]
    found = [RESULTS[name] for name in names if name in RESULTS]
    return found[-1] if found else FailureReason.DEVICE_ERROR


def infer_failed(error: Exception) -> EngineError:
    """Translate the error of an inference."""
    text = root_cause(str(error))
    reason = reason_of(str(error))
    if reason in LOST:
        return DeviceLost(f"The device is lost: {text}", reason)
    return InferFailed(f"The inference failed: {text}", reason)


def compile_failed(text: str, action: str) -> CompileFailed:
    """Translate the error of compiling, importing or opening a device.

    Args:
        text: message of OpenVINO.
        action: what failed, as the start of a sentence.
    """
    if any(words in text for words in NO_COMPILER):
        return CompileFailed(
            f"{action} failed: the NPU compiler is missing or finds no NPU. On Linux it is part of "
            "the driver: install intel-driver-compiler-npu with intel-level-zero-npu.",
            FailureReason.NO_COMPILER,
        )
    reason = reason_of(text)
    reason = FailureReason.COMPILE_REFUSED if reason is FailureReason.DEVICE_ERROR else reason
    words = root_cause(text)
    if reason is FailureReason.DRIVER_MISMATCH:
        words = f"{words.rstrip('. ')}. {FIT_DRIVER}"
    return CompileFailed(f"{action} failed: {words}", reason)


def root_cause(text: str) -> str:
    """Extract the cause from OpenVINO's nested exceptions, without source locations."""
    lines = [line.strip() for line in text.splitlines()]
    causes = [line for line in lines if line and not line.startswith(("Exception from ", "At:"))]
    level_zero = [line for line in causes if _NAME.search(line)]
    return " ".join(level_zero[-1:] or causes[-2:])[-400:] or text.strip()[-400:]
