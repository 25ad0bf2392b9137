"""Defines what a worker publishes about itself: the model it serves and its status.

Both are read from Redis by processes that may be older or newer than their writer, so every field
is checked for its type and texts are stripped of control characters. Pure: no I/O, no clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

import msgpack

from embedq.errors import MalformedMessage

#: Maximum length of a text field, characters; the rest is cut off.
MAX_FIELD_CHARS: Final = 2_000

#: Maximum absolute value of a number; keeps Unix times within the range of calendars.
MAX_NUMBER: Final = 1e12

_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")

_TYPES: Final[Mapping[object, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def strip_control_chars(text: str) -> str:
    """Replace control characters, which a terminal would execute, and truncate."""
    return _CONTROLS.sub(" ", text[:MAX_FIELD_CHARS])


def validate_fields(kind: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a message that a dataclass declares, with their types checked.

    Control characters are stripped from texts, except where the field is excluded from the
    dataclass's repr: those are user content.

    Raises:
        TypeError: a field has the wrong type or a number is out of bounds.
    """
    checked = {}
    for known in fields(kind):
        if known.name not in body:
            continue
        value = body[known.name]
        if not isinstance(value, _TYPES.get(known.type, (object,))):
            raise TypeError(f"{known.name} is {type(value).__name__}, expected {known.type}.")
        if isinstance(value, int | float) and not abs(value) <= MAX_NUMBER:
            raise TypeError(f"{known.name} is out of bounds.")
        checked[known.name] = (
            strip_control_chars(value) if isinstance(value, str) and known.repr else value
        )
    return checked


#: Maximum number of components of a vector.
MAX_DIM: Final = 65_536


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The model that a worker serves. The SDK reads it here and needs no model file.

    Attributes:
        label: the worker's ``EMBEDQ_MODEL`` with its revision; for display only.
        identity: sha256 of weights, tokenizer and configuration, in hex.
        dim: number of components of a vector.
        max_length: maximum number of tokens of a text, special tokens included.
        pooling: ``mean`` or ``cls``.
        normalized: vectors have unit length.
        prompts: name of a prompt -> prefix of each text.
        default_prompt: name of the prompt if the caller chooses none; empty for no prompt.
        quantized: name of the quantized model for accuracy class ``int8``; empty for none.
        weights_precision: how the model's file stores its weights: ``f32``, ``f16``, ``bf16`` or
            ``int8``. Only ``f32`` serves class ``exact``.
    """

    label: str
    identity: str
    dim: int
    max_length: int
    pooling: str = "mean"
    normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    quantized: str = ""
    weights_precision: str = "f32"

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ModelInfo:
        """Build from an unpacked message; fields of a newer version are ignored.

        Raises:
            TypeError, AttributeError: a field is missing, out of bounds or of the wrong type.
        """
        model_info = cls(**validate_fields(cls, body))
        if not all(
            isinstance(word, str) for prompt in model_info.prompts.items() for word in prompt
        ):
            raise TypeError("A prompt is not a text.")
        if not 0 < model_info.dim <= MAX_DIM or model_info.max_length < 1:
            raise TypeError(
                f"dim is {model_info.dim:,}, expected 1 to {MAX_DIM:,}; max_length is "
                f"{model_info.max_length:,}, expected at least 1."
            )
        return model_info


class WorkerState(StrEnum):
    """State of a worker; docs/device-health.md describes the transitions."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    PROBING = "probing"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """State of one worker: its status file, and its heartbeat in Redis.

    The pool process writes the status file; the main process merges it with the device's health
    and publishes the result.

    Attributes:
        worker: name, the same after a restart.
        state: see WorkerState.
        state_since: Unix time of the last change of state, seconds.
        pool_pid: process id of the pool process; 0 for none.
        pid: process id of the main process.
        at: Unix time of the heartbeat, seconds.
        reason: why the worker is not healthy, as a sentence; empty if it is healthy.
        code: why the worker is not healthy, as a reason code; empty if it is healthy.
        device, engine, precision: where batches are computed; empty while no engine is open.
        assigned_device: device of a healthy worker; differs from `device` while degraded.
        will_retry: a degraded NPU will be probed again.
        model_info: the model served, or None while no engine is open.
        failure_count: number of consecutive NPU failures.
        next_probe_at: Unix time of the next probe, seconds; 0 while none is scheduled.
        busy_since: monotonic time at which the running engine call started, seconds; 0 for none.
        inference_s: duration of an NPU inference when the device was new, seconds; 0 if unknown.
        totals: counters by name, since the pool process started in its status file, since the main
            process started in a heartbeat.
    """

    worker: str
    state: WorkerState
    state_since: float
    pool_pid: int = 0
    pid: int = 0
    at: float = 0.0
    reason: str = ""
    code: str = ""
    device: str = ""
    engine: str = ""
    precision: str = ""
    assigned_device: str = ""
    will_retry: bool = False
    model_info: ModelInfo | None = None
    failure_count: int = 0
    next_probe_at: float = 0.0
    busy_since: float = 0.0
    inference_s: float = 0.0
    totals: Mapping[str, float] = field(default_factory=dict)

    def to_message(self) -> bytes:
        """Encode as msgpack."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_message(cls, raw: bytes) -> WorkerStatus:
        """Decode; fields of a newer version are ignored.

        Raises:
            MalformedMessage: the bytes are not a WorkerStatus.
        """
        try:
            body = validate_fields(cls, msgpack.unpackb(raw))
            model_info = body.pop("model_info", None)
            if not all(isinstance(total, int | float) for total in body.get("totals", {}).values()):
                raise TypeError("A total is not a number.")
            body["state"] = WorkerState(body["state"])
            return cls(**body, model_info=ModelInfo.from_body(model_info) if model_info else None)
        except Exception as error:
            raise MalformedMessage(f"A status of {len(raw):,} bytes cannot be decoded.") from error
