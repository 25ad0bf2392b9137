"""The card of a model: what its nodes announce of it, so that a producer needs no model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

import msgpack

from embedq.errors import MalformedMessage


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
        known = {f.name for f in fields(cls)}
        try:
            body = msgpack.unpackb(raw)
            return cls(**{key: value for key, value in body.items() if key in known})
        except Exception as error:
            raise MalformedMessage(f"A model card of {len(raw):,} bytes is unreadable.") from error
