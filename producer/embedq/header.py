"""The header of a message: every field but its texts, checked before anything is inflated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from embedq.contract import (
    MAX_BATCH_TEXTS,
    MAX_BATCHES,
    MAX_RAW_BYTES,
    SCHEMA,
    Accuracy,
    Dtype,
    OnLong,
    VectorSpec,
)
from embedq.errors import BatchTooLarge, MalformedMessage, UnknownSchema

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{32,64}")


@dataclass(frozen=True, slots=True)
class Header:
    """The part of a message that can be checked without touching its texts.

    Attributes:
        job, index, n, spec, refused, rerouted: as in EmbedBatch; ``n`` counts the texts.
        raw_bytes: declared size of the texts field once inflated.
        packed: the compressed texts field.
    """

    job: str
    index: int
    n: int
    spec: VectorSpec
    refused: Mapping[int, str]
    rerouted: bool
    raw_bytes: int
    packed: bytes = field(repr=False)

    @staticmethod
    def address(body: object) -> tuple[str, int] | None:
        """Return job and index of a message however broken the rest is, or None."""
        if not isinstance(body, Mapping):
            return None
        job, index = body.get("job"), body.get("i")
        if not isinstance(job, str) or not _JOB_ID.fullmatch(job):
            return None
        if type(index) is not int or not 0 <= index < MAX_BATCHES:
            return None
        return job, index

    @classmethod
    def from_message(cls, body: object) -> Header:
        """Check every field but the texts.

        Raises:
            UnknownSchema, BatchTooLarge, MalformedMessage: as EmbedBatch.from_message.
        """
        if not isinstance(body, Mapping):
            raise MalformedMessage(f"A message is a map, not {type(body).__name__}.")
        schema = body.get("v")
        if type(schema) is not int or schema < 1:
            raise MalformedMessage("The message names no schema.")
        if schema > SCHEMA:
            raise UnknownSchema(
                f"The message has schema {schema}; this node speaks up to {SCHEMA}. "
                "Upgrade embedq on the node, nodes before producers."
            )
        address = cls.address(body)
        if address is None:
            raise MalformedMessage("The message has no usable job id and batch index.")
        n = _bounded(body, "n", MAX_BATCH_TEXTS)
        raw_bytes = _bounded(body, "raw", MAX_RAW_BYTES)
        packed = body.get("texts")
        if not isinstance(packed, bytes):
            raise MalformedMessage("The texts field is not bytes.")
        # zstd may expand incompressible input a little; anything larger than that is forged.
        if len(packed) > raw_bytes + raw_bytes // 128 + 1024:
            raise BatchTooLarge(
                f"The compressed texts have {len(packed):,} bytes for {raw_bytes:,} declared."
            )
        return cls(
            job=address[0],
            index=address[1],
            n=n,
            spec=_spec(body.get("spec")),
            refused=_refused(body.get("refused"), n),
            rerouted=body.get("rerouted") is True,
            raw_bytes=raw_bytes,
            packed=packed,
        )


def _bounded(body: Mapping[str, object], key: str, limit: int) -> int:
    value = body.get(key)
    if type(value) is not int or value < 0:
        raise MalformedMessage(f"Field {key!r} is not a count.")
    if value > limit:
        raise BatchTooLarge(f"Field {key!r} is {value:,}; the limit is {limit:,}.")
    return value


def _spec(value: object) -> VectorSpec:
    if not isinstance(value, list | tuple) or len(value) != len(VectorSpec._fields):
        raise MalformedMessage("The vector specification has the wrong number of fields.")
    model, dim, max_length, prompt, on_long, accuracy, dtype, quantised = value
    try:
        spec = VectorSpec(
            model,
            dim,
            max_length,
            prompt,
            OnLong(on_long),
            Accuracy(accuracy),
            Dtype(dtype),
            quantised,
        )
    except ValueError as error:
        raise MalformedMessage(f"The vector specification is unknown: {error}.") from None
    right_types = (
        isinstance(model, str)
        and _DIGEST.fullmatch(model)
        and type(dim) is int
        and 0 < dim <= 65_536
        and type(max_length) is int
        and 0 < max_length <= 1_000_000
        and isinstance(prompt, str)
        and len(prompt) <= 65_536
        and isinstance(quantised, str)
        and len(quantised) <= 64
    )
    if not right_types:
        raise MalformedMessage("The vector specification has a value of the wrong type or size.")
    return spec


def _refused(value: object, n: int) -> dict[int, str]:
    if not isinstance(value, Mapping) or len(value) > n:
        raise MalformedMessage("The refused texts are not a map of offsets.")
    refused = {}
    for offset, code in value.items():
        if not (isinstance(offset, str) and offset.isascii() and offset.isdigit()):
            raise MalformedMessage("A refused text has no offset.")
        if len(offset) > 5 or int(offset) >= n or not isinstance(code, str) or len(code) > 64:
            raise MalformedMessage("A refused text is outside the batch.")
        refused[int(offset)] = code
    return refused
