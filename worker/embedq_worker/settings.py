"""The words that a worker's settings may hold, and which of them exclude each other.

What a worker can be told through the environment.
"""

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

from embedq.settings import (
    DEFAULT_MODEL,
    INTERNAL,
    RedisSettings,
    cache_home,
    unit,
)
from embedq_worker.files import default_runtime_dir


class DeviceChoice(StrEnum):
    """What a worker may be started on."""

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


class Emulation(StrEnum):
    """What may play the NPU where there is none: for tests and rehearsals."""

    NONE = "none"
    ALIAS = "alias"
    NPUW = "npuw"


class StubDevice(StrEnum):
    """What a stub may play."""

    CPU = "cpu"
    NPU = "npu"


class LogLevel(StrEnum):
    """How much a worker says."""

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
            f"EMBEDQ_STRICT and EMBEDQ_DEVICE={device} exclude each other: a strict worker "
            f"computes "
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
    if settings.npu_emulation is not Emulation.NONE and device is not DeviceChoice.NPU:
        yield (
            f"EMBEDQ_NPU_EMULATION={settings.npu_emulation} and EMBEDQ_DEVICE={device} exclude "
            f"each "
            "other: an emulated NPU plays the NPU. Use EMBEDQ_DEVICE=npu, or unset "
            "EMBEDQ_NPU_EMULATION."
        )


__all__ = ["DeviceChoice", "LogLevel", "WorkerSettings"]


#: How a setting that is a map may be written.
MAP_FORMS = "Input should be KEY=VALUE,KEY=VALUE, or a JSON object"


def default_lock_dir() -> Path:
    """Return a folder that every user of this machine sees, for they share its devices."""
    system = Path("/run/lock")
    # Not TMPDIR: a local run, and pam_tmpdir, give each process or user one of its own.
    return system if system.is_dir() else Path("/tmp")


def default_name(data: dict[str, Any]) -> str:
    """Name a worker by its host and its device setting, which a restart does not change."""
    device = data.get("device", DeviceChoice.AUTO)
    return f"{socket.gethostname().partition('.')[0]}-{device}"


class WorkerSettings(RedisSettings):
    """Settings of one worker."""

    device: DeviceChoice = Field(
        DeviceChoice.AUTO,
        description="What the worker computes on: npu, cpu, auto (an NPU if there is one), or "
        "stub.",
    )
    strict: bool = Field(
        False,
        description="Compute on the NPU or not at all; the worker ends if it cannot prove its NPU.",
    )
    name: str = Field(
        default_factory=default_name,
        description="Name of the worker, the same over restarts and unique in the fleet.",
    )
    npu_device_file: Path | None = Field(
        None,
        description="Device file of the NPU, as /dev/accel/accel0, where several are visible.",
    )
    lock_dir: Path = Field(
        default_factory=default_lock_dir,
        description="Folder of the locks of NPUs; the same for all containers of a machine.",
    )
    engine: EngineChoice = Field(
        EngineChoice.AUTO,
        description="What runs the model: openvino, onnxruntime, or auto for the faster.",
    )
    precision: PrecisionChoice = Field(
        PrecisionChoice.AUTO,
        description="Arithmetic of the engine: f32, bf16, f16, int8, or auto for the device's own.",
    )
    npu_binding: Binding = Field(
        Binding.PINNED,
        description="How tensors reach the NPU: pinned, host_tensor or shared.",
    )
    npu_commandlist_mode: CommandlistMode | None = Field(
        None,
        description="NPU_COMMANDLIST_MODE, for plugins that know it.",
    )
    npu_properties: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description="Further properties for the NPU plugin: KEY=VALUE,KEY=VALUE, or a JSON object.",
    )
    npu_requests: int = Field(
        0,
        ge=0,
        le=64,
        description="Inference requests on the NPU; 0 takes as many as the device likes, 1 to 8.",
        json_schema_extra=unit("requests"),
    )
    compile_timeout_s: float = Field(
        600.0,
        gt=0,
        le=86_400,
        description="Time after which a compiler counts as hung and is stopped.",
        json_schema_extra=unit("s"),
    )
    infer_timeout_s: float = Field(
        0.0,
        ge=0,
        le=3_600,
        description="The same for one inference on the NPU; 0 measures: 20 times the slowest.",
        json_schema_extra=unit("s"),
    )
    cpu_serves_npu_queue: bool = Field(
        True,
        description="A worker on the CPU also takes batches of embed.npu.",
    )
    cpu_fallback: bool = Field(
        True,
        description="A worker whose NPU is not to be trusted serves on its CPU meanwhile.",
    )
    model: str = Field(
        DEFAULT_MODEL,
        description="Model to serve: a hub id or a folder.",
    )
    model_revision: str | None = Field(
        None,
        description="Revision of a hub model; the default model is pinned without it.",
    )
    cache_dir: Path = Field(
        default_factory=cache_home,
        description="Folder for checksums and compiled models; private to this user.",
    )
    runtime_dir: Path = Field(
        default_factory=default_runtime_dir,
        description="Folder for the worker's state file; private to this user.",
    )
    offline: bool = Field(
        False,
        description="Never ask the model hub.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Cores that the engine may use; 0 takes all that this process may run on.",
        json_schema_extra=unit("cores"),
    )
    streams: int = Field(
        0,
        ge=0,
        le=1024,
        description="Number of concurrent inferences on the CPU; 0 = one per core.",
        json_schema_extra=unit("inferences"),
    )
    token_budget: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Maximum number of padded tokens per inference; 0 = 512.",
        json_schema_extra=unit("tokens"),
    )
    engine_timeout_s: float = Field(
        300.0,
        gt=0,
        le=86_400,
        description="Longest time the engine may take for one batch; then its process is replaced.",
        json_schema_extra=unit("s"),
    )
    infer_failures: int = Field(
        1,
        ge=1,
        le=1_000,
        description="Failed batches on the NPU, within a window, at which it is given up.",
        json_schema_extra=unit("batches"),
    )
    shadow_check_every: int = Field(
        64,
        ge=0,
        le=1_000_000,
        description="One text in this many batches on the NPU is recomputed in fp32; 0 for none.",
        json_schema_extra=unit("batches"),
    )
    init_timeout_s: float = Field(
        900.0,
        gt=0,
        le=86_400,
        description="Longest time for opening and proving the NPU, at the start and in a probe.",
        json_schema_extra=unit("s"),
    )
    crash_loop_limit: int = Field(
        5,
        ge=1,
        le=1_000,
        description="Deaths of the worker's process, within a window, at which the NPU is given "
        "up.",
        json_schema_extra=unit("deaths"),
    )
    probe_initial_delay_s: float = Field(
        30.0,
        gt=0,
        le=86_400,
        description="Time after which an NPU that was given up is tried again; doubles each time.",
        json_schema_extra=unit("s"),
    )
    probe_max_delay_s: float = Field(
        600.0,
        gt=0,
        le=86_400,
        description="What that time grows to.",
        json_schema_extra=unit("s"),
    )
    log_level: LogLevel = Field(
        LogLevel.INFO,
        description="How much the worker says: debug, info, warning or error.",
    )

    # Internal settings, for tests and benchmarks: read like the others, but neither in the README
    # nor printed by `embedq-worker settings`.
    npu_emulation: Emulation = Field(
        Emulation.NONE,
        description="What emulates the NPU: alias, npuw, or none for a real NPU.",
        json_schema_extra=INTERNAL,
    )
    slow_batches: int = Field(
        5,
        ge=1,
        le=1_000,
        description="Number of consecutive slow batches after which the NPU is marked unhealthy.",
        json_schema_extra=INTERNAL,
    )
    crash_loop_window_s: float = Field(
        60.0,
        gt=0,
        le=86_400,
        description="Period in which exits of the pool process count towards CRASH_LOOP_LIMIT.",
        json_schema_extra=INTERNAL,
    )
    lease_renewal_s: float = Field(
        10.0,
        gt=0,
        le=3_600,
        description="Interval of lease renewals, at most a quarter of the visibility timeout.",
        json_schema_extra=INTERNAL,
    )
    heartbeat_s: float = Field(
        5.0,
        gt=0,
        le=10,
        description="Interval of heartbeats while the state of the worker does not change.",
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
        description="Delay of the stub engine in each inference.",
        json_schema_extra=INTERNAL,
    )
    stub_texts_per_s: float = Field(
        0.0,
        ge=0,
        description="Throughput of the stub engine; 0 = unlimited.",
        json_schema_extra=INTERNAL,
    )
    stub_faults: Path | None = Field(
        None,
        description="File with the faults of the stub engine, read before each inference.",
        json_schema_extra=INTERNAL,
    )
    stub_tokenizer: Path | None = Field(
        None,
        description="tokenizer.json of the stub engine, whose vectors then depend on its tokens.",
        json_schema_extra=INTERNAL,
    )

    @field_validator("npu_properties", mode="before")
    @classmethod
    def _map(cls, value: object) -> object:
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
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
            raise ValueError(
                "Input should be 1 to 64 letters, digits, dots, dashes and underscores"
            )
        return value

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        if found := "\n".join(contradictions(self)):
            raise ValueError(found)
        return self

    def cores(self) -> int:
        """Return how many cores the engine may use."""
        if self.threads:
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
