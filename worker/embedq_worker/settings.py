"""Settings of a worker, read from environment variables."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from embedq.settings import DEFAULT_MODEL, INTERNAL, RedisSettings, cache_home
from embedq_worker.files import default_runtime_dir

#: Duration of more than nothing and at most a day.
Seconds = Annotated[float, Field(gt=0, le=86_400)]

#: Number of events after which a worker acts.
Count = Annotated[int, Field(ge=1, le=1_000)]

#: Part of an error message: the accepted forms of a setting that is a map.
MAP_FORMS = "Input should be KEY=VALUE,KEY=VALUE, or a JSON object"


class DeviceChoice(StrEnum):
    """Values of EMBEDQ_DEVICE."""

    AUTO = "auto"
    NPU = "npu"
    CPU = "cpu"
    STUB = "stub"


class EngineChoice(StrEnum):
    """Values of EMBEDQ_ENGINE."""

    AUTO = "auto"
    OPENVINO = "openvino"
    ONNXRUNTIME = "onnxruntime"


class PrecisionChoice(StrEnum):
    """Values of EMBEDQ_PRECISION."""

    AUTO = "auto"
    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"


class CommandlistMode(StrEnum):
    """Values of EMBEDQ_NPU_COMMANDLIST_MODE, defined in OpenVINO pull request 35626."""

    DEFAULT = "DEFAULT"
    FORCE_UPDATE_MUTABLE_COMMANDLIST = "FORCE_UPDATE_MUTABLE_COMMANDLIST"
    FORCE_COMMANDLIST_RECORDING_ONLY = "FORCE_COMMANDLIST_RECORDING_ONLY"


class Emulation(StrEnum):
    """Values of EMBEDQ_NPU_EMULATION."""

    NONE = "none"
    ALIAS = "alias"
    NPUW = "npuw"


class StubDevice(StrEnum):
    """Values of EMBEDQ_STUB_DEVICE."""

    CPU = "cpu"
    NPU = "npu"


class LogLevel(StrEnum):
    """Values of EMBEDQ_LOG_LEVEL."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def contradictions(settings: WorkerSettings) -> Iterator[str]:
    """Yield an error message for each pair of settings that exclude each other."""
    device, engine, precision = settings.device, settings.engine, settings.precision
    stubbed_npu = device is DeviceChoice.STUB and settings.stub_device is StubDevice.NPU
    if settings.strict and not (device in (DeviceChoice.AUTO, DeviceChoice.NPU) or stubbed_npu):
        yield (
            f"EMBEDQ_STRICT and EMBEDQ_DEVICE={device} exclude each other: a strict worker "
            "computes on an NPU only. Use EMBEDQ_DEVICE=npu, or unset EMBEDQ_STRICT."
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
            "or bf16. Use EMBEDQ_PRECISION=f32 or bf16, or EMBEDQ_DEVICE=npu."
        )
    if engine is EngineChoice.ONNXRUNTIME and precision not in (
        PrecisionChoice.AUTO,
        PrecisionChoice.F32,
    ):
        yield (
            f"EMBEDQ_PRECISION={precision} and EMBEDQ_ENGINE=onnxruntime exclude each other: "
            "onnxruntime computes in f32. Use EMBEDQ_ENGINE=openvino, or EMBEDQ_PRECISION=f32."
        )
    if settings.npu_emulation is not Emulation.NONE and device is not DeviceChoice.NPU:
        yield (
            f"EMBEDQ_NPU_EMULATION={settings.npu_emulation} and EMBEDQ_DEVICE={device} exclude "
            "each other: emulation replaces the NPU. Use EMBEDQ_DEVICE=npu, or unset "
            "EMBEDQ_NPU_EMULATION."
        )


def available_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity


def default_lock_dir() -> Path:
    """Return a folder that all users of this machine share, as they share its devices."""
    system = Path("/run/lock")
    # Not TMPDIR: with --local or pam_tmpdir, each process or user has its own.
    return system if system.is_dir() else Path("/tmp")


def default_name(data: dict[str, Any]) -> str:
    """Return HOST-DEVICE.

    It uses the device setting, not the device found, which changes when a driver is missing.
    """
    device = data.get("device", DeviceChoice.AUTO)
    return f"{socket.gethostname().partition('.')[0]}-{device}"


class WorkerSettings(RedisSettings):
    """Settings of one worker."""

    device: DeviceChoice = Field(
        DeviceChoice.AUTO,
        description="Device to compute on: npu, cpu, auto (an NPU if there is one, else the CPU) "
        "or stub (no model, for tests).",
    )
    strict: bool = Field(
        False,
        description="Compute on the NPU only; the worker exits if its NPU fails the self-test.",
    )
    name: str = Field(
        default_factory=default_name,
        description="Name of the worker, unique in the fleet and stable across restarts; the "
        "default is HOST-DEVICE.",
    )
    npu_device_file: Path | None = Field(
        None,
        description="Device file of the NPU, for example /dev/accel/accel0; needed if several are "
        "visible.",
    )
    lock_dir: Path = Field(
        default_factory=default_lock_dir,
        description="Folder of the NPU lock files, shared by all containers of a machine.",
    )
    engine: EngineChoice = Field(
        EngineChoice.AUTO,
        description="Runtime of the model: openvino, onnxruntime or auto (the faster one).",
    )
    precision: PrecisionChoice = Field(
        PrecisionChoice.AUTO,
        description="Arithmetic of the engine: f32 or bf16 on a CPU, f16 on an NPU, or auto.",
    )
    npu_commandlist_mode: CommandlistMode | None = Field(
        None, description="Property NPU_COMMANDLIST_MODE of the NPU plugin; empty = not set."
    )
    npu_properties: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Further properties of the NPU plugin: KEY=VALUE,KEY=VALUE or a JSON object.",
    )
    npu_requests: int = Field(
        0,
        ge=0,
        le=64,
        description="Number of concurrent inference requests on the NPU; 0 = the device's optimum, "
        "1 to 8.",
        json_schema_extra={"unit": "requests"},
    )
    compile_timeout_s: Seconds = Field(
        600.0, description="Timeout of the NPU compiler, after which its process is killed."
    )
    infer_timeout_s: float = Field(
        0.0,
        ge=0,
        le=3_600,
        description="Timeout of one NPU inference; 0 = 20 x the slowest warm-up inference, "
        "at least 2 s.",
    )
    cpu_serves_npu_queue: bool = Field(
        True, description="A worker on a CPU consumes embed.npu as well as embed.cpu."
    )
    cpu_fallback: bool = Field(
        True,
        description="A worker whose NPU is degraded serves on its CPU; if false, it waits for the "
        "NPU.",
    )
    model: str = Field(DEFAULT_MODEL, description="Model to serve: a hub id or a folder.")
    model_revision: str | None = Field(
        None,
        description="Revision of a hub model; empty = the pinned one of the default model, main "
        "of others.",
    )
    pooling: str = Field(
        "",
        description="Pooling of a model whose files name none: mean, cls, max, mean_sqrt_len, "
        "weightedmean or last; empty = as its files say.",
    )
    prompts: str = Field(
        "",
        description="Set of prompts of a model whose files name none: e5, bge-en or nomic; empty = "
        "as its files say. A set names prompts; a job chooses one by name.",
    )
    model_file: str = Field(
        "",
        description="File of the model's weights, inside its folder or hub repo, such as "
        "onnx/model_quantized.onnx; empty = model.safetensors of a type that embedq builds, "
        "otherwise model.onnx or onnx/model.onnx.",
    )
    max_length: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Maximum length of a text; longer ones are truncated. 0 = as the model's files "
        "say, at most 512 on an NPU.",
        json_schema_extra={"unit": "tokens"},
    )
    cache_dir: Path = Field(
        default_factory=cache_home,
        description="Folder for checksums, compiled and quantized models; private to this user.",
    )
    runtime_dir: Path = Field(
        default_factory=default_runtime_dir,
        description="Folder for status, liveness and lock files of the worker; private to this "
        "user.",
    )
    offline: bool = Field(
        False, description="Use model files of this machine only; never contact the hub."
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Number of CPU cores the engine uses; 0 = all that the process may run on.",
        json_schema_extra={"unit": "cores"},
    )
    streams: int = Field(
        0,
        ge=0,
        le=1024,
        description="Number of concurrent inferences on the CPU; 0 = one per core.",
        json_schema_extra={"unit": "inferences"},
    )
    token_budget: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Maximum number of padded tokens per inference; 0 = 512.",
        json_schema_extra={"unit": "tokens"},
    )
    engine_timeout_s: Seconds = Field(
        300.0,
        description="Timeout of one batch in the engine, after which the pool process is replaced.",
    )
    infer_failures: Count = Field(
        1,
        description="Number of failed NPU batches within 60 s after which the NPU is degraded.",
        json_schema_extra={"unit": "batches"},
    )
    shadow_check_every: int = Field(
        64,
        ge=0,
        le=1_000_000,
        description="Number of NPU batches per shadow check, which recomputes one text in fp32; "
        "0 = no checks.",
        json_schema_extra={"unit": "batches"},
    )
    init_timeout_s: Seconds = Field(
        900.0,
        description="Timeout of opening and self-testing the NPU, at the start and in a probe.",
    )
    crash_loop_limit: Count = Field(
        5,
        description="Number of pool process exits within 60 s after which the NPU is degraded.",
        json_schema_extra={"unit": "exits"},
    )
    probe_initial_delay_s: Seconds = Field(
        30.0,
        description="Delay before the first probe of a degraded NPU; each failed probe doubles it.",
    )
    probe_max_delay_s: Seconds = Field(
        600.0, description="Maximum delay between two probes of a degraded NPU."
    )
    log_level: LogLevel = Field(
        LogLevel.INFO,
        description="Lowest level of log lines that are written: debug, info, warning or error.",
    )

    # Internal settings, for tests and benchmarks: `embedq-worker settings` does not print them.
    npu_emulation: Emulation = Field(
        Emulation.NONE,
        description="How the NPU is emulated: alias, npuw, or none for a real NPU.",
        json_schema_extra=INTERNAL,
    )
    slow_batches: Count = Field(
        5,
        description="Number of consecutive slow batches after which the NPU is degraded.",
        json_schema_extra=INTERNAL,
    )
    crash_loop_window_s: Seconds = Field(
        60.0,
        description="Period in which pool process exits count towards CRASH_LOOP_LIMIT, seconds.",
        json_schema_extra=INTERNAL,
    )
    lease_renewal_s: float = Field(
        10.0,
        gt=0,
        le=3_600,
        description="Interval of lease renewals, seconds, at most VISIBILITY_TIMEOUT_S / 4.",
        json_schema_extra=INTERNAL,
    )
    heartbeat_s: float = Field(
        5.0,
        gt=0,
        le=10,
        description="Interval of heartbeats while the worker's state does not change, seconds.",
        json_schema_extra=INTERNAL,
    )
    stub_device: StubDevice = Field(
        StubDevice.CPU,
        description="Device whose queues the stub engine consumes: cpu or npu.",
        json_schema_extra=INTERNAL,
    )
    stub_delay_s: float = Field(
        0.0,
        ge=0,
        le=3_600,
        description="Duration of each inference of the stub engine, seconds.",
        json_schema_extra=INTERNAL,
    )
    stub_texts_per_s: float = Field(
        0.0,
        ge=0,
        description="Throughput of the stub engine, texts per second; 0 = unlimited.",
        json_schema_extra=INTERNAL,
    )
    stub_faults: Path | None = Field(
        None,
        description="File of faults that the stub engine injects, read before each inference.",
        json_schema_extra=INTERNAL,
    )
    stub_tokenizer: Path | None = Field(
        None,
        description="tokenizer.json for the stub engine; empty = one token per word.",
        json_schema_extra=INTERNAL,
    )

    @field_validator("npu_properties", mode="before")
    @classmethod
    def _parse_map(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("{"):
            try:
                return {str(key): str(item) for key, item in json.loads(value).items()}
            except json.JSONDecodeError:
                raise ValueError(MAP_FORMS) from None
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(key.strip() and sign for key, sign, _ in pairs):
            raise ValueError(MAP_FORMS)
        return {key.strip(): item.strip() for key, _, item in pairs}

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
            raise ValueError(
                "Input should be 1 to 64 letters, digits, dots, dashes and underscores"
            )
        return value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if found := "\n".join(contradictions(self)):
            raise ValueError(found)
        return self

    def cores(self) -> int:
        """Return the number of cores the engine may use."""
        return self.threads or available_cores()
