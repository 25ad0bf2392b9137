"""What a worker says of itself: model, state, heartbeat.

Records that others wrote into Redis: types checked, words fit for a terminal. Pure.

The card of a model: what its workers announce of it, so that a producer needs no model file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any, Final

import msgpack

from embedq.errors import MalformedMessage

#: Most characters of a field that is shown.
LONGEST: Final = 2_000


#: Largest number, in size: times in seconds stay within what calendars know.
LARGEST: Final = 1e12


_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


_TYPES: Final[Mapping[object, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def strip_control_chars(text: str) -> str:
    """Return a text without what moves a cursor or ends a line, and not too long."""
    return _CONTROLS.sub(" ", text[:LONGEST])


def validate_fields(kind: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a body that a dataclass knows, each of the type that it says.

    Texts come back plain, but for those that the class keeps out of its repr: they are content.

    Raises:
        TypeError: a field is of another type, or no number to work with.
    """
    found = {}
    for known in fields(kind):
        if known.name not in body:
            continue
        value = body[known.name]
        if not isinstance(value, _TYPES.get(known.type, (object,))):
            raise TypeError(f"{known.name} is {type(value).__name__}, expected {known.type}.")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise TypeError(f"{known.name} is out of bounds.")
        found[known.name] = (
            strip_control_chars(value) if isinstance(value, str) and known.repr else value
        )
    return found


#: Most components of a vector.
MAX_DIM: Final = 65_536


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a worker announces of the model it serves, so that the SDK needs no model file.

    Attributes:
        label: what ``EMBEDQ_MODEL`` says on the worker, with its revision; a name, never an
            identity.
        identity: sha256 in hex of weights, tokenizer and configuration.
        dim: components of a vector.
        max_length: tokens the model takes, special tokens included.
        pooling: ``mean`` or ``cls``.
        normalized: vectors have unit length.
        prompts: name -> text put before each input.
        default_prompt: the name used when the caller names none; empty for none.
        quantized: name of the quantized model for class ``int8``; empty where there is none.
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

    def to_message(self) -> bytes:
        """Encode the card as msgpack."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_message(cls, raw: bytes) -> ModelInfo:
        """Decode a card.

        Raises:
            MalformedMessage: the bytes are not a card of this version.
        """
        try:
            return cls.from_body(msgpack.unpackb(raw))
        except Exception as error:
            raise MalformedMessage(f"A model card of {len(raw):,} bytes is unreadable.") from error

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ModelInfo:
        """Take a card from an unpacked message; fields of a newer version are ignored.

        Raises:
            TypeError, AttributeError: it is none.
        """
        model_info = cls(**validate_fields(cls, body))
        if not all(
            isinstance(word, str) for prompt in model_info.prompts.items() for word in prompt
        ):
            raise TypeError("A prompt is no text.")
        if not 0 < model_info.dim <= MAX_DIM or model_info.max_length < 1:
            raise TypeError(
                f"A vector of {model_info.dim:,} components, {model_info.max_length:,} tokens."
            )
        return model_info


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a worker says of itself.

    Attributes:
        worker: name, the same over restarts.
        state: starting, healthy, degraded, probing or failed.
        reason: why, when it is not healthy.
        since: Unix time of the last change of state, in seconds.
        device, engine, precision: what computes here.
        home: the device that the worker is for; another than `device` while it is degraded.
        may_return: a degraded NPU will be tried again.
        model_info: the model served, or None while there is none.
        code: why it is not healthy, in a word.
        count: how often its NPU was given up in a row.
        probe_at: Unix time at which its NPU is tried again, in seconds; 0 if none is planned.
        at: Unix time of this heartbeat, in seconds.
        pid: of the worker's parent process.
        totals: what its child has computed since it began; names and numbers that only rise.
    """

    worker: str
    state: str
    at: float
    state_since: float
    pid: int
    reason: str = ""
    device: str = ""
    engine: str = ""
    precision: str = ""
    model_info: ModelInfo | None = None
    assigned_device: str = ""
    will_retry: bool = False
    code: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    failure_count: int = 0
    next_probe_at: float = 0.0

    def to_message(self) -> bytes:
        """Encode as msgpack."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_message(cls, raw: bytes) -> Heartbeat:
        """Decode a heartbeat; fields of a newer version are ignored.

        Raises:
            MalformedMessage: the bytes are not a heartbeat.
        """
        try:
            body = validate_fields(cls, msgpack.unpackb(raw))
            model_info = body.pop("model_info", None)
            totals = body.pop("totals", {})
            if not all(isinstance(total, int | float) for total in totals.values()):
                raise TypeError("A total is no number.")
            return cls(
                **body,
                totals=totals,
                model_info=ModelInfo.from_body(model_info) if model_info else None,
            )
        except Exception as error:
            raise MalformedMessage(f"A heartbeat of {len(raw):,} bytes is unreadable.") from error


class WorkerState(StrEnum):
    """States of a worker."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    PROBING = "probing"
    FAILED = "failed"
