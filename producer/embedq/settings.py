"""Reads the settings of the SDK from EMBEDQ_* environment variables and secret files."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, SettingsConfigDict

from embedq.errors import SettingsError
from embedq.protocol.contract import MAX_BATCH_TEXTS, Accuracy, Dtype, OnLong

#: Prefix of every setting's environment variable.
PREFIX = "EMBEDQ_"

#: Folder of Docker and Kubernetes secrets. A file named like a variable in lower case sets its
#: value if the variable is not set; `docker inspect` does not show it.
SECRETS_DIR = Path("/run/secrets")

#: URL schemes that Celery and redis-py support.
_SCHEMES = ("redis://", "rediss://", "redis+socket://")

#: URL scheme that only redis-py supports.
_UNIX = "unix://"

#: Default of EMBEDQ_MODEL for producer and worker.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"

#: Minimum similarity (0 to 1) of an unknown variable to a setting for it to be a typo. Settings of
#: producer and worker are less similar than this to each other.
TYPO_SIMILARITY = 0.8


class SettingInfo(NamedTuple):
    """One setting, as printed by the `settings` commands.

    Attributes:
        name: environment variable.
        value: current value, passwords masked.
        source: origin of the value: ``environment``, ``secret`` or ``default``.
        default: default value, passwords masked.
        unit: unit of the value; empty for none.
        description: meaning of the setting.
    """

    name: str
    value: str
    source: str
    default: str
    unit: str
    description: str


class EnvSettings(BaseSettings):
    """Base of all settings classes: variable prefix, strict names, readable errors."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the settings; overrides that are not None replace the environment.

        Raises:
            SettingsError: a name or value is wrong; the message says what is expected.
        """
        _check_names(cls.variables(), os.environ)
        try:
            values = {key: value for key, value in overrides.items() if value is not None}
            return cls(**values, **({"_secrets_dir": SECRETS_DIR} if SECRETS_DIR.is_dir() else {}))
        except ValidationError as error:
            lines = [
                _explain(cls, details)
                for details in error.errors()
                if details["type"] != _DEFAULT_NOT_COMPUTED
            ]
            raise SettingsError("\n".join(lines)) from None

    @classmethod
    def variables(cls) -> frozenset[str]:
        """Return the names of the environment variables of this class."""
        return frozenset(PREFIX + name.upper() for name in cls.model_fields)

    @classmethod
    def public_fields(cls) -> dict[str, FieldInfo]:
        """Return the fields that are not marked as internal."""
        return {
            name: info
            for name, info in cls.model_fields.items()
            if info.json_schema_extra != INTERNAL
        }

    def describe(self) -> Iterator[SettingInfo]:
        """Yield each public setting, in the order of the class."""
        present = {name.upper() for name in os.environ}
        for name, info in type(self).public_fields().items():
            variable = PREFIX + name.upper()
            default = info.get_default(call_default_factory=True, validated_data=vars(self))
            yield SettingInfo(
                variable,
                mask_password(str(getattr(self, name))),
                _source(variable, present),
                mask_password(str(default)),
                unit_of(name, info),
                info.description or "",
            )


#: Mark of a field that the `settings` commands do not print, for tests only.
INTERNAL: dict[str, Any] = {"internal": True}


def unit_of(name: str, info: FieldInfo) -> str:
    """Return the unit of a setting, "s" if its name ends in `_s`; empty if it has none."""
    extra = info.json_schema_extra or {"unit": "s" if name.endswith("_s") else ""}
    return str(extra.get("unit", "")) if isinstance(extra, dict) else ""


class RedisSettings(EnvSettings):
    """Settings that producer and worker share."""

    broker_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,  # may contain a password
        description="Redis that carries the queues of batches.",
        json_schema_extra={"unit": "URL"},
    )
    results_url: str = Field(
        "redis://127.0.0.1:6379/1",
        repr=False,
        description="Redis that holds ledgers and vectors; in production, use another instance "
        "than for EMBEDQ_BROKER_URL.",
        json_schema_extra={"unit": "URL"},
    )
    visibility_timeout_s: int = Field(
        60,
        ge=4,
        le=86_400,
        description="Lease of a batch: if it is not renewed for this time, another worker receives "
        "the batch. Use the same value for all producers and workers.",
    )
    traces: bool = Field(
        False,
        description="Export OpenTelemetry spans, configured by the OTEL_* variables; needs "
        "embedq[otel].",
    )

    @field_validator("broker_url", "results_url")
    @classmethod
    def _check_redis_url(cls, url: str, info: ValidationInfo) -> str:
        # Celery treats a string without a scheme as a RabbitMQ host and retries forever.
        if url.startswith(_SCHEMES) or (info.field_name == "results_url" and url.startswith(_UNIX)):
            return url
        raise ValueError(
            "Input should be redis://host:port/db, rediss://host:port/db or redis+socket:///path?virtual_host=db"
        )

    @property
    def addresses(self) -> str:
        """Addresses of both Redis without passwords, for error messages."""
        return f"{mask_password(self.broker_url)} or {mask_password(self.results_url)}"


class ProducerSettings(RedisSettings):
    """Settings of the SDK and the `embedq` command."""

    model: str = Field(
        DEFAULT_MODEL,
        description="Model that a job requires: a hub id, or the model folder set on the workers.",
    )
    accuracy: Accuracy = Field(
        Accuracy.STANDARD,
        description="Accuracy class of vectors: standard (cosine >= 0.999 to fp32), exact (fp32) "
        "or int8 (quantized model).",
    )
    dtype: Dtype = Field(
        Dtype.FLOAT32,
        description="Type of stored and returned vectors: float32, or float16 with half the size.",
    )
    strict: bool = Field(
        False,
        description="Accept vectors from NPUs only; a job fails if no NPU is available for "
        "EMBEDQ_STARTUP_TIMEOUT_S.",
    )
    on_long: OnLong = Field(
        OnLong.TRUNCATE,
        description="Policy for a text with more tokens than the model accepts: truncate (and "
        "report it) or error (the text fails).",
    )
    batch_texts: int = Field(
        MAX_BATCH_TEXTS,
        ge=1,
        le=MAX_BATCH_TEXTS,
        description="Maximum number of texts in a batch; more texts become further batches.",
        json_schema_extra={"unit": "texts"},
    )
    batch_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Estimated number of tokens at which a batch is full; 0 chooses a value for "
        "the devices of the fleet.",
        json_schema_extra={"unit": "tokens"},
    )
    max_in_flight: int = Field(
        0,
        ge=0,
        le=1024,
        description="Maximum number of batches of a job in flight; at the limit the producer "
        "waits. 0 = 4 per live worker, at least 16, at most 256.",
        json_schema_extra={"unit": "batches"},
    )
    results_ttl_s: int = Field(
        86_400,
        ge=60,
        le=30 * 86_400,
        description="Time to live of a job in Redis after the last activity of its producer or "
        "workers; then its vectors are deleted.",
    )
    startup_timeout_s: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="Maximum wait of a call for Redis and a worker, and of a strict job for an "
        "NPU; then it fails.",
    )

    @model_validator(mode="after")
    def _check_strict(self) -> Self:
        if self.strict and self.accuracy is not Accuracy.STANDARD:
            raise ValueError(
                f"EMBEDQ_STRICT and EMBEDQ_ACCURACY={self.accuracy} exclude each other: only a "
                "CPU computes with this accuracy, and a strict job accepts vectors from NPUs only. "
                "Drop one of the two."
            )
        return self


def mask_password(url: str) -> str:
    """Mask the password of a URL; return any other text unchanged."""
    if "://" not in url or "@" not in url:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    user = parts.username or ""
    return urlunsplit(parts._replace(netloc=f"{user}:***@{host}"))


def _source(variable: str, present: Collection[str]) -> str:
    if variable in present:
        return "environment"
    return "secret" if (SECRETS_DIR / variable.lower()).is_file() else "default"


def _check_names(own: frozenset[str], environment: Collection[str]) -> None:
    names = [name.removeprefix(PREFIX) for name in own]
    lines = []
    for variable in environment:
        if not variable.startswith(PREFIX) or variable in own:
            continue
        name = variable.removeprefix(PREFIX)
        for meant in difflib.get_close_matches(name, names, n=1, cutoff=TYPO_SIMILARITY):
            lines.append(f"{variable}: no such setting. Did you mean {PREFIX}{meant}?")
    if lines:
        raise SettingsError("\n".join(lines))


def _explain(cls: type[EnvSettings], details: ErrorDetails) -> str:
    error = details.get("ctx", {}).get("error")
    message = str(error) if isinstance(error, ValueError) else details["msg"]
    if not details["loc"]:  # a check of several settings; its message contains their names
        return message
    field = str(details["loc"][0])
    info = cls.model_fields.get(field)
    got = f", got {details['input']}" if info is not None and info.repr else ""
    return f"{PREFIX}{field.upper()}: {message}{got}."


#: Pydantic's error type of a computed default that depends on an invalid field.
_DEFAULT_NOT_COMPUTED = "default_factory_not_called"


def cache_home() -> Path:
    """Return the cache folder of this user: embedq in XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "embedq"
