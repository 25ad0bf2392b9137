"""The card of a model: what its nodes announce of it, so that a producer needs no model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

import msgpack

from embedq.errors import MalformedMessage
from embedq.records import checked

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
