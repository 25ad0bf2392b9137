"""Settings from the environment: one class per room, one prefix, and no variable read elsewhere."""

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

#: Put before the name of every setting.
PREFIX = "EMBEDQ_"


#: Where Docker and Kubernetes put secrets: a file there, named like a variable in lower case, sets
#: what the variable does not, and shows in no `docker inspect`.
SECRETS_DIR = Path("/run/secrets")


#: How URLs begin that Celery opens, and one more that only redis-py does.
_SCHEMES = ("redis://", "rediss://", "redis+socket://")


_UNIX = "unix://"


#: The default of EMBEDQ_MODEL on both sides.
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


#: Similarity from which on an unknown variable counts as a misspelled setting. The names of the
#: producer's and the worker's settings are less similar to each other.
MISSPELLED = 0.8


class SettingInfo(NamedTuple):
    """One setting as a person should see it.

    Attributes:
        name: the environment variable.
        value: what is in force, passwords masked.
        source: ``environment``, ``secret`` or ``default``.
        default, unit, description: as the class says.
    """

    name: str
    value: str
    source: str
    default: str
    unit: str
    description: str


class EnvSettings(BaseSettings):
    """What every settings class shares: the prefix, strict names and readable errors."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment, with overrides (None means: not given) on top.

        Raises:
            SettingsError: a name or value is wrong; the message names the nearest right one.
        """
        _check_names(cls.variables(), os.environ)
        try:
            given = {key: value for key, value in overrides.items() if value is not None}
            return cls(**given, **({"_secrets_dir": SECRETS_DIR} if SECRETS_DIR.is_dir() else {}))
        except ValidationError as error:
            found = [each for each in error.errors() if each["type"] != _DEFAULT_NOT_COMPUTED]
            lines = [_explain(cls, details) for details in found]
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
        """Yield each public setting with its value, unit and source, in the order of the class."""
        present = {name.upper() for name in os.environ}
        for name, info in type(self).public_fields().items():
            variable = PREFIX + name.upper()
            default = info.get_default(call_default_factory=True, validated_data=vars(self))
            extra = info.json_schema_extra
            unit = extra.get("unit", "") if isinstance(extra, dict) else ""
            yield SettingInfo(
                variable,
                mask_password(str(getattr(self, name))),
                _source(variable, present),
                mask_password(str(default)),
                str(unit),
                info.description or "",
            )


#: Marks a field that is neither in the README nor printed by the `settings` commands.
INTERNAL: dict[str, Any] = {"internal": True}


def unit(name: str) -> dict[str, Any]:
    """Attach a unit to a pydantic field."""
    return {"unit": name}


class RedisSettings(EnvSettings):
    """Where Redis is: shared by producer and worker."""

    broker_url: str = Field(
        "redis://127.0.0.1:6379/0",
        repr=False,  # may hold a password
        description="Redis that carries the batches.",
        json_schema_extra=unit("URL"),
    )
    results_url: str = Field(
        "redis://127.0.0.1:6379/1",
        repr=False,
        description="Redis that holds the ledger and the vectors; in production another instance.",
        json_schema_extra=unit("URL"),
    )
    visibility_timeout_s: int = Field(
        60,
        ge=4,
        le=86_400,
        description="Silence after which another worker may take over a batch; same for all.",
        json_schema_extra=unit("s"),
    )
    traces: bool = Field(
        False,
        description="Send OpenTelemetry spans to where the OTEL_* variables say; needs the extra.",
    )

    @field_validator("broker_url", "results_url")
    @classmethod
    def _is_of_redis(cls, url: str, info: ValidationInfo) -> str:
        # Celery takes a word for the host of a RabbitMQ, tries that for ever, and has no unix://.
        if url.startswith(_SCHEMES) or (info.field_name == "results_url" and url.startswith(_UNIX)):
            return url
        raise ValueError(
            "Input should be redis://host:port/db, rediss://host:port/db or redis+socket:///path?virtual_host=db"
        )

    @property
    def addresses(self) -> str:
        """Both Redis, without passwords, for messages about either."""
        return f"{mask_password(self.broker_url)} or {mask_password(self.results_url)}"


class ProducerSettings(RedisSettings):
    """What the SDK and the `embedq` command can be told."""

    model: str = Field(
        DEFAULT_MODEL,
        description="Model to ask for: a hub id, or the folder that the workers were given.",
    )
    accuracy: Accuracy = Field(
        Accuracy.STANDARD,
        description="Accuracy class: standard (cosine >= 0.999 to fp32), exact (fp32) or int8.",
    )
    dtype: Dtype = Field(
        Dtype.FLOAT32,
        description="How vectors travel and arrive: float32, or float16 at half the bytes.",
    )
    strict: bool = Field(
        False,
        description="Take vectors from an NPU or not at all.",
    )
    on_long: OnLong = Field(
        OnLong.TRUNCATE,
        description="Texts of more tokens than the model takes: truncate (and report) or error.",
    )
    batch_texts: int = Field(
        MAX_BATCH_TEXTS,
        ge=1,
        le=MAX_BATCH_TEXTS,
        description="Most texts in one batch.",
        json_schema_extra=unit("texts"),
    )
    batch_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="Estimated tokens at which a batch is full; 0 suits the fleet's devices.",
        json_schema_extra=unit("tokens"),
    )
    max_in_flight: int = Field(
        0,
        ge=0,
        le=1024,
        description="Most batches of a job in flight; 0 takes four per living worker, 16 to 256.",
        json_schema_extra=unit("batches"),
    )
    results_ttl_s: int = Field(
        86_400,
        ge=60,
        le=30 * 86_400,
        description="Life of a job in Redis after its last sign of life.",
        json_schema_extra=unit("s"),
    )
    startup_timeout_s: float = Field(
        60.0,
        ge=0,
        le=86_400,
        description="How long a start waits for Redis and a worker, and a strict job for an NPU.",
        json_schema_extra=unit("s"),
    )

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.strict and self.accuracy is not Accuracy.STANDARD:
            raise ValueError(
                f"EMBEDQ_STRICT and EMBEDQ_ACCURACY={self.accuracy} exclude each other: only the "
                "CPU computes so, and a strict job takes vectors from an NPU alone. Drop one of "
                "the two."
            )
        return self


def mask_password(url: str) -> str:
    """Hide the password of a URL; anything else comes back as it is."""
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
    """Refuse a variable that is no setting but has a name similar to one."""
    names = [name.removeprefix(PREFIX) for name in own]
    lines = []
    for variable in environment:
        if not variable.startswith(PREFIX) or variable in own:
            continue
        name = variable.removeprefix(PREFIX)
        for meant in difflib.get_close_matches(name, names, n=1, cutoff=MISSPELLED):
            lines.append(f"{variable}: no such setting. Did you mean {PREFIX}{meant}?")
    if lines:
        raise SettingsError("\n".join(lines))


def _explain(cls: type[EnvSettings], details: ErrorDetails) -> str:
    """Return pydantic's message with the name of the variable, and its value unless secret."""
    error = details.get("ctx", {}).get("error")
    message = str(error) if isinstance(error, ValueError) else details["msg"]
    if not details["loc"]:  # from a check of several settings, whose message contains their names
        return message
    field = str(details["loc"][0])
    info = cls.model_fields.get(field)
    given = f", got {details['input']}" if info is not None and info.repr else ""
    return f"{PREFIX}{field.upper()}: {message}{given}."


#: Type of pydantic's error for a computed default that depends on a field with an error.
_DEFAULT_NOT_COMPUTED = "default_factory_not_called"


def cache_home() -> Path:
    """Return the folder for caches of this user: XDG_CACHE_HOME or ~/.cache, then embedq."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "embedq"
