"""The message of one batch: encode, validate, decode.

The header of a message: every field but its texts, checked before anything is inflated.

The message between producer and worker: the texts of a batch, framed, compressed and named.

Every producer imports this file: no Celery, no Redis, no runtime.
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from embedq.errors import BatchTooLarge, MalformedMessage, UnknownSchema
from embedq.protocol.contract import (
    MAX_BATCH_BYTES,
    MAX_BATCH_TEXTS,
    MAX_BATCHES,
    MAX_RAW_BYTES,
    MAX_TEXT_BYTES,
    PUBLISHED_HEADER,
    SCHEMA,
    Accuracy,
    Code,
    Dtype,
    OnLong,
    VectorSpec,
    refusal,
)

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
                f"The message has schema {schema}; this worker speaks up to {SCHEMA}. "
                "Upgrade embedq on the worker, workers before producers."
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
    model, dim, max_length, prompt, on_long, accuracy, dtype, quantized = value
    try:
        spec = VectorSpec(
            model,
            dim,
            max_length,
            prompt,
            OnLong(on_long),
            Accuracy(accuracy),
            Dtype(dtype),
            quantized,
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
        and isinstance(quantized, str)
        and len(quantized) <= 64
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


if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


#: Level 3 costs the producer a third of gzip and packs prose as well. Without a checksum a flipped
#: bit often gives other texts of the same lengths, and they would be embedded.
ZSTD_OPTIONS: Final[Mapping[int, int]] = {
    zstd.CompressionParameter.compression_level: 3,
    zstd.CompressionParameter.checksum_flag: 1,
}


@dataclass(frozen=True, slots=True)
class EmbedBatch:
    """One wire message: the texts of one task run, where they belong, and how to embed them.

    Attributes:
        job: id of the job, ``[A-Za-z0-9_-]{1,64}``.
        index: position of this batch in the job.
        texts: the texts in the caller's order; a refused one is an empty string.
        spec: what shapes the vectors.
        refused: offset of each text that the producer refused -> its code.
        rerouted: the batch was handed over from an NPU worker.
    """

    job: str
    index: int
    texts: Sequence[str] = field(repr=False)
    spec: VectorSpec
    refused: Mapping[int, str] = field(default_factory=dict)
    rerouted: bool = False

    @property
    def task_id(self) -> str:
        """The Celery task id: the same content at the same place always has the same one."""
        return f"{self.job}:{self.index}:{self.digest()}"

    def digest(self) -> str:
        """Name the content: 32 hex characters of everything that shapes these vectors."""
        state = hashlib.sha256(self.spec.fingerprint())
        for offset, text in enumerate(self.texts):
            raw = text.encode()
            state.update(struct.pack("<I", len(raw)))
            state.update(raw)
            state.update(self.refused.get(offset, "").encode())
        return state.hexdigest()[:32]

    def to_message(self) -> dict[str, Any]:
        """Encode the batch as a map of msgpack types; the texts are framed and compressed.

        Raises:
            BatchTooLarge: more texts or bytes than the contract allows.
        """
        if len(self.texts) > MAX_BATCH_TEXTS:
            raise BatchTooLarge(
                f"Batch has {len(self.texts):,} texts; the limit is {MAX_BATCH_TEXTS:,}. "
                "Split it, or use Client.encode(), which splits for you."
            )
        encoded = [text.encode() for text in self.texts]
        raw = struct.pack(f"<{len(encoded)}I", *map(len, encoded)) + b"".join(encoded)
        if len(raw) > MAX_RAW_BYTES:
            raise BatchTooLarge(
                f"Batch has {len(raw):,} bytes of text; the limit is {MAX_BATCH_BYTES:,}. "
                "Split it, or use Client.encode(), which splits for you."
            )
        return {
            "v": SCHEMA,
            "job": self.job,
            "i": self.index,
            "n": len(encoded),
            "spec": self.spec.plain(),
            "refused": {str(offset): str(code) for offset, code in self.refused.items()},
            "rerouted": self.rerouted,
            "raw": len(raw),
            "texts": zstd.compress(raw, options=ZSTD_OPTIONS),
        }

    @classmethod
    def from_message(cls, body: object) -> EmbedBatch:
        """Check and decode a message; nothing is inflated before its size is bounded.

        A text that is not UTF-8 is not an error of the batch: it comes back as refused.

        Raises:
            UnknownSchema: the message is newer than this code.
            BatchTooLarge: it declares or holds more than the contract allows.
            MalformedMessage: anything else is wrong with it.
        """
        header = Header.from_message(body)
        raw = _inflate(header.packed, header.raw_bytes)
        framed = 4 * header.n <= len(raw)
        lengths = struct.unpack_from(f"<{header.n}I", raw) if framed else ()
        if not framed or 4 * header.n + sum(lengths) != len(raw):
            raise MalformedMessage("The lengths of the texts do not add up to the declared size.")
        refused = dict(header.refused)
        texts: list[str] = []
        at = 4 * header.n
        # Asked of all texts at once: nearly always it is so, and a device may be waiting for them.
        sound = max(lengths, default=0) <= MAX_TEXT_BYTES and raw.find(b"\0", at) < 0
        for offset, length in enumerate(lengths):
            text = ""
            try:
                text = raw[at : at + length].decode()
            except UnicodeDecodeError:
                refused.setdefault(offset, Code.NOT_UNICODE)
            if not sound and (code := refusal(text)):
                refused.setdefault(offset, code)
            texts.append("" if offset in refused else text)
            at += length
        return cls(header.job, header.index, texts, header.spec, refused, header.rerouted)


def message_headers(body: Mapping[str, Any], published: float) -> dict[str, Any]:
    """Return the options of Celery that keep texts out of headers, events and Flower.

    Args:
        body: a message, as from EmbedBatch.to_message.
        published: Unix time in seconds; tells how long a message waits, and which may be lost.
    """
    return {
        # Celery's own repr would copy the first kilobyte of the arguments.
        "argsrepr": f"<{body['n']} texts, {body['raw'] / 1000:.0f} kB>",
        "kwargsrepr": "{}",
        "headers": {PUBLISHED_HEADER: published},
    }


def _inflate(packed: bytes, size: int) -> bytes:
    """Inflate within the declared size; one byte more is a forgery.

    The frame header says how much memory a decoder would need, so a window larger than the
    contract allows is refused by zstd itself before it allocates.
    """
    window = zstd.DecompressionParameter.window_log_max
    decoder = zstd.ZstdDecompressor(options={window: 23})
    try:
        raw: bytes = decoder.decompress(packed, max_length=size + 1)
    except zstd.ZstdError:
        raise MalformedMessage("The texts field is not zstd, or is damaged.") from None
    if len(raw) != size or not decoder.eof or decoder.unused_data:
        raise MalformedMessage(
            f"The texts field does not inflate to the {size:,} bytes that it declares."
        )
    return raw
