"""What a worker says of itself: model, state, heartbeat.

Records that others wrote into Redis: types checked, words fit for a terminal. Pure.

The card of a model: what its nodes announce of it, so that a producer needs no model file.
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


def plain(text: str) -> str:
    """Return a text without what moves a cursor or ends a line, and not too long."""
    return _CONTROLS.sub(" ", text[:LONGEST])


def checked(kind: Any, body: Mapping[str, Any]) -> dict[str, Any]:
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
        found[known.name] = plain(value) if isinstance(value, str) and known.repr else value
    return found


#: Most components of a vector.
MAX_DIM: Final = 65_536


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a node announces of the model it serves, so that the SDK needs no model file.

    Attributes:
        label: what ``EMBEDQ_MODEL`` says on the node, with its revision; a name, never an identity.
        identity: sha256 in hex of weights, tokenizer and configuration.
        dim: components of a vector.
        max_length: tokens the model takes, special tokens included.
        pooling: ``mean`` or ``cls``.
        normalized: vectors have unit length.
        prompts: name -> text put before each input.
        default_prompt: the name used when the caller names none; empty for none.
        quantised: name of the quantised model for class ``int8``; empty where there is none.
    """

    label: str
    identity: str
    dim: int
    max_length: int
    pooling: str = "mean"
    normalized: bool = True
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""
    quantised: str = ""

    def to_message(self) -> bytes:
        """Encode the card as msgpack."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_message(cls, raw: bytes) -> ModelCard:
        """Decode a card.

        Raises:
            MalformedMessage: the bytes are not a card of this version.
        """
        try:
            return cls.from_body(msgpack.unpackb(raw))
        except Exception as error:
            raise MalformedMessage(f"A model card of {len(raw):,} bytes is unreadable.") from error

    @classmethod
    def from_body(cls, body: Mapping[str, Any]) -> ModelCard:
        """Take a card from an unpacked message; fields of a newer version are ignored.

        Raises:
            TypeError, AttributeError: it is none.
        """
        card = cls(**checked(cls, body))
        if not all(isinstance(word, str) for prompt in card.prompts.items() for word in prompt):
            raise TypeError("A prompt is no text.")
        if not 0 < card.dim <= MAX_DIM or card.max_length < 1:
            raise TypeError(f"A vector of {card.dim:,} components, {card.max_length:,} tokens.")
        return card


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a node says of itself.

    Attributes:
        node: name, the same over restarts.
        state: starting, healthy, degraded, probing or failed.
        reason: why, when it is not healthy.
        since: Unix time of the last change of state, in seconds.
        device, engine, precision: what computes here.
        home: the device that the node is for; another than `device` while it is degraded.
        may_return: a degraded NPU will be tried again.
        card: the model served, or None while there is none.
        code: why it is not healthy, in a word.
        count: how often its NPU was given up in a row.
        probe_at: Unix time at which its NPU is tried again, in seconds; 0 if none is planned.
        at: Unix time of this heartbeat, in seconds.
        pid: of the node's parent process.
        totals: what its child has computed since it began; names and numbers that only rise.
    """

    node: str
    state: str
    at: float
    since: float
    pid: int
    reason: str = ""
    device: str = ""
    engine: str = ""
    precision: str = ""
    card: ModelCard | None = None
    home: str = ""
    may_return: bool = False
    code: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    count: int = 0
    probe_at: float = 0.0

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
            body = checked(cls, msgpack.unpackb(raw))
            card = body.pop("card", None)
            totals = body.pop("totals", {})
            if not all(isinstance(total, int | float) for total in totals.values()):
                raise TypeError("A total is no number.")
            return cls(**body, totals=totals, card=ModelCard.from_body(card) if card else None)
        except Exception as error:
            raise MalformedMessage(f"A heartbeat of {len(raw):,} bytes is unreadable.") from error


class State(StrEnum):
    """States of a node."""

    STARTING = "starting"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    PROBING = "probing"
    FAILED = "failed"
