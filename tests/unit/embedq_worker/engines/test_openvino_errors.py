"""Tests of how messages of OpenVINO and Level Zero become errors with a reason."""

from __future__ import annotations

import pytest

from embedq_worker.engines.openvino_errors import compile_failed, infer_failed
from embedq_worker.errors import DeviceLost, EngineError, FailureReason, InferFailed

LOST = (
    "Exception from src/inference/src/cpp/infer_request.cpp:224:\n"
    "zero_wrappers.cpp:382: L0 zeFenceHostSynchronize result: ZE_RESULT_ERROR_DEVICE_LOST, code "
    "0x70000001 - device hung, reset, was removed, or driver update occurred\n"
)


@pytest.mark.parametrize(
    ("text", "kind", "reason"),
    [
        (LOST, DeviceLost, FailureReason.DEVICE_LOST),
        (
            "L0 zeCommandQueueExecuteCommandLists result: 0x70000001",
            DeviceLost,
            FailureReason.DEVICE_LOST,
        ),
        (
            "result: ZE_RESULT_ERROR_UNKNOWN, code 0x7ffffffe",
            DeviceLost,
            FailureReason.DEVICE_UNKNOWN,
        ),
        ("result: ZE_RESULT_NOT_READY, code 0x1", DeviceLost, FailureReason.DEVICE_UNKNOWN),
        (
            "L0 pfnAppendGraphExecute result: ZE_RESULT_ERROR_UNINITIALIZED, code 0x78000001 - "
            "driver is not initialized . ",
            DeviceLost,
            FailureReason.DEVICE_UNKNOWN,
        ),
        (
            "L0 zeMemAllocHost result: ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY, code 0x70000003",
            InferFailed,
            FailureReason.OUT_OF_MEMORY,
        ),
        ("Infer Request is busy", InferFailed, FailureReason.DEVICE_ERROR),
        ("something new", InferFailed, FailureReason.DEVICE_ERROR),
        ("result: ZE_RESULT_ERROR_INVALID_ARGUMENT, code 0x78000004", InferFailed, "device_error"),
        ("", InferFailed, FailureReason.DEVICE_ERROR),
    ],
)
def test_inference_error_has_class_and_reason(
    text: str, kind: type[EngineError], reason: FailureReason
) -> None:
    error = infer_failed(RuntimeError(text))

    assert type(error) is kind
    assert error.reason == reason


def test_error_message_has_the_cause_without_source_locations() -> None:
    message = str(infer_failed(RuntimeError(LOST)))

    assert "ZE_RESULT_ERROR_DEVICE_LOST" in message
    assert "Exception from" not in message


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        (
            "VCL compiler loading failed, aborting. Error: Cannot load library x.so",
            FailureReason.NO_COMPILER,
            "intel-driver-compiler-npu",
        ),
        (
            "Could not find an NPU device. The driver compiler requires a valid device to be "
            "present in the system.",
            FailureReason.NO_COMPILER,
            "intel-level-zero-npu",
        ),
        (
            "L0 pfnCreate2 result: ZE_RESULT_ERROR_INVALID_NATIVE_BINARY, code 0x7800000f",
            FailureReason.CACHE_ENTRY_INVALID,
            "Importing failed",
        ),
        (
            "L0 createGraph result: ZE_RESULT_ERROR_UNSUPPORTED_VERSION, code 0x78000002. ERROR! "
            "MAPPED_INFERENCE_VERSION is NOT compatible with the ELF Expected: 6.1.0 vs received: "
            "7.0.0",
            FailureReason.DRIVER_MISMATCH,
            "of one release",
        ),
        (
            "L0 pfnCreate2 result: ZE_RESULT_ERROR_UNINITIALIZED, code 0x78000001 - driver is not "
            "initialized . ",
            FailureReason.DEVICE_UNKNOWN,
            "not initialized",
        ),
        ("to_shape was called on a dynamic shape", FailureReason.COMPILE_REFUSED, "dynamic shape"),
    ],
)
def test_compile_error_has_reason_and_fix(text: str, reason: FailureReason, words: str) -> None:
    # Source of the text about versions: linux-npu-driver issue 28.
    error = compile_failed(text, "Importing")

    assert error.reason is reason
    assert words in str(error)


@pytest.mark.parametrize("kind", [EngineError, InferFailed, DeviceLost])
def test_default_reason_is_the_code_of_the_error_class(kind: type[EngineError]) -> None:
    assert kind("text").reason == kind.code
