"""What OpenVINO says when something fails -> an error of ours with a reason.

Every failure of a plugin is a plain RuntimeError, so its text decides. Level Zero's result is the
part that does not depend on the place it came from: `ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from embedq_worker.errors import CompileFailed, DeviceLost, EngineError, FailureReason, InferFailed

#: Level Zero's results by name. UNKNOWN and NOT_READY are in the class of DEVICE_LOST: the driver
#: says them for a context that a reset has killed. So is UNINITIALIZED, which it says as well for
#: one that is full (linux-npu-driver issue 149).
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


#: The same by number, for texts that name none.
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


#: Words of the plugin about a compiler that is not there.
NO_COMPILER: Final = ("VCL compiler loading failed", "driver compiler requires a valid device")


#: What helps where firmware, driver and compiler are of different ages (linux-npu-driver issue 28).
FIT_DRIVER: Final = (
    "The driver is too old, or its parts are of different releases: install intel-fw-npu, "
    "intel-level-zero-npu and intel-driver-compiler-npu of one release."
)


#: Reasons for which only a new process can use the device again.
LOST: Final = frozenset(
    {FailureReason.DEVICE_LOST, FailureReason.DEVICE_UNKNOWN, FailureReason.DEADLINE}
)


_NAME = re.compile(r"ZE_RESULT_(?:ERROR_)?([A-Z][A-Z_]*[A-Z])")


_CODE = re.compile(r"\b0x7[0-9a-fA-F]{7}\b")


def reason_of(text: str) -> FailureReason:
    """Find why an inference or a device failed; a text that nobody knows is a device error."""
    names = _NAME.findall(text) or [
        CODES[int(code, 16)] for code in _CODE.findall(text) if int(code, 16) in CODES
    ]
    found = [RESULTS[name] for name in names if name in RESULTS]
    return found[-1] if found else FailureReason.DEVICE_ERROR


def infer_failed(error: Exception) -> EngineError:
    """Translate what came out of an inference."""
    text = root_cause(str(error))
    reason = reason_of(str(error))
    if reason in LOST:
        return DeviceLost(f"The device is gone: {text}", reason)
    return InferFailed(f"The inference failed: {text}", reason)


def compile_failed(text: str, doing: str) -> CompileFailed:
    """Translate what came out of compiling, importing or opening a device.

    Args:
        text: what OpenVINO said.
        doing: what was tried, as the start of a sentence.
    """
    if any(words in text for words in NO_COMPILER):
        return CompileFailed(
            f"{doing} failed: no NPU compiler, or no NPU for the driver's. On Linux it comes with "
            "the driver: install intel-driver-compiler-npu beside intel-level-zero-npu.",
            FailureReason.NO_COMPILER,
        )
    reason = reason_of(text)
    reason = FailureReason.COMPILE_REFUSED if reason is FailureReason.DEVICE_ERROR else reason
    words = root_cause(text)
    if reason is FailureReason.DRIVER_MISMATCH:
        words = f"{words.rstrip('. ')}. {FIT_DRIVER}"
    return CompileFailed(f"{doing} failed: {words}", reason)


def root_cause(text: str) -> str:
    """Return the cause out of OpenVINO's stack of exceptions, without the places it passed."""
    lines = [line.strip() for line in text.splitlines()]
    causes = [line for line in lines if line and not line.startswith(("Exception from ", "At:"))]
    level_zero = [line for line in causes if _NAME.search(line)]
    return " ".join(level_zero[-1:] or causes[-2:])[-400:] or text.strip()[-400:]
