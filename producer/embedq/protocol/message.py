"""Encodes, validates and decodes the message of one batch.

Every field is checked before the texts are decompressed.
Every user of the SDK imports this module: no Celery, no Redis, no runtime.
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

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_DIGEST = re.compile(r"[0-9a-f]{32,64}")


@dataclass(frozen=True, slots=True)
class Header:
    """Validated fields of a message, before its texts are decompressed.

    Attributes:
        job, index, spec, refused, rerouted: as in EmbedBatch.
        n: number of texts.
        raw_bytes: declared size of the decompressed texts field.
        packed: compressed texts field.
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
        """Return job id and batch index, or None; the other fields may be invalid."""
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
        """Check every field except the content of the texts.

        Raises:
            UnknownSchema, BatchTooLarge, MalformedMessage: as in EmbedBatch.from_message.
        """
        if not isinstance(body, Mapping):
            raise MalformedMessage(f"The message is of type {type(body).__name__}, expected a map.")
        schema = body.get("v")
        if type(schema) is not int or schema < 1:
            raise MalformedMessage("The message has no schema version (field 'v').")
        if schema > SCHEMA:
            raise UnknownSchema(
                f"The message has schema version {schema}; this worker supports up to {SCHEMA}. "
                "Upgrade embedq on the worker; always upgrade workers before producers."
            )
        address = cls.address(body)
        if address is None:
            raise MalformedMessage("The message has no valid job id and batch index.")
        n = _bounded(body, "n", MAX_BATCH_TEXTS)
        raw_bytes = _bounded(body, "raw", MAX_RAW_BYTES)
        packed = body.get("texts")
        if not isinstance(packed, bytes):
            raise MalformedMessage(
                f"The texts field is of type {type(packed).__name__}, expected bytes."
            )
        # zstd expands incompressible input by a little at most.
        if len(packed) > raw_bytes + raw_bytes // 128 + 1024:
            raise BatchTooLarge(
                f"The compressed texts have {len(packed):,} bytes, but the message declares "
                f"{raw_bytes:,} bytes uncompressed."
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
        raise MalformedMessage(f"Field {key!r} is not an integer from 0.")
    if value > limit:
        raise BatchTooLarge(f"Field {key!r} is {value:,}; the limit is {limit:,}.")
    return value


def _spec(value: object) -> VectorSpec:
    if not isinstance(value, list | tuple) or len(value) != len(VectorSpec._fields):
        raise MalformedMessage(
            f"The vector specification is not a list of {len(VectorSpec._fields)} fields."
        )
    model, dim, max_length, prompt, on_long, accuracy, dtype, quantized = value
    try:
        options = OnLong(on_long), Accuracy(accuracy), Dtype(dtype)
    except ValueError as error:
        raise MalformedMessage(f"The vector specification has an unknown value: {error}.") from None
    is_valid = (
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
    if not is_valid:
        raise MalformedMessage("The vector specification has a field of the wrong type or size.")
    return VectorSpec(model, dim, max_length, prompt, *options, quantized)


def _refused(value: object, n: int) -> dict[int, str]:
    if not isinstance(value, Mapping) or len(value) > n:
        raise MalformedMessage(f"Field 'refused' is not a map with at most {n:,} entries.")
    refused = {}
    for offset, code in value.items():
        if not (isinstance(offset, str) and offset.isascii() and offset.isdigit()):
            raise MalformedMessage("Field 'refused' has a key that is not an offset.")
        if len(offset) > 5 or int(offset) >= n or not isinstance(code, str) or len(code) > 64:
            raise MalformedMessage(
                f"Field 'refused' has an offset beyond {n - 1:,} or an invalid code."
            )
        refused[int(offset)] = code
    return refused


#: Options of the compression of texts. Without a checksum, a flipped bit often decodes to other
#: texts of the same lengths.
ZSTD_OPTIONS: Final[Mapping[int, int]] = {
    zstd.CompressionParameter.compression_level: 3,
    zstd.CompressionParameter.checksum_flag: 1,
}


@dataclass(frozen=True, slots=True)
class EmbedBatch:
    """Texts of one message, with their position in the job and their vector specification.

    Attributes:
        job: id of the job, ``[A-Za-z0-9_-]{1,64}``.
        index: number of the batch in the job, from 0.
        texts: texts in the caller's order; a refused text is an empty string.
        spec: vector specification.
        refused: offset of a text that cannot be embedded -> code.
        rerouted: the batch was moved from an NPU worker.
    """

    job: str
    index: int
    texts: Sequence[str] = field(repr=False)
    spec: VectorSpec
    refused: Mapping[int, str] = field(default_factory=dict)
    rerouted: bool = False

    @property
    def task_id(self) -> str:
        """Celery task id; equal for equal content at the same position of the same job."""
        return f"{self.job}:{self.index}:{self.digest()}"

    def digest(self) -> str:
        """Return 32 hex characters of a hash of the texts and their specification."""
        state = hashlib.sha256(self.spec.fingerprint())
        for offset, text in enumerate(self.texts):
            raw = text.encode()
            state.update(struct.pack("<I", len(raw)))
            state.update(raw)
            state.update(self.refused.get(offset, "").encode())
        return state.hexdigest()[:32]

    def to_message(self) -> dict[str, Any]:
        """Encode the batch as a map of msgpack types; the texts are compressed.

        Raises:
            BatchTooLarge: the batch has more texts or bytes than one message may have.
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
            "spec": self.spec.as_list(),
            "refused": {str(offset): str(code) for offset, code in self.refused.items()},
            "rerouted": self.rerouted,
            "raw": len(raw),
            "texts": zstd.compress(raw, options=ZSTD_OPTIONS),
        }

    @classmethod
    def from_message(cls, body: object) -> EmbedBatch:
        """Check and decode a message; at most the declared size is decompressed.

        A text that cannot be embedded, for example because it is not UTF-8, is marked as refused;
        it does not fail the batch.

        Raises:
            UnknownSchema: the message has a newer schema version.
            BatchTooLarge: the message declares or contains more texts or bytes than allowed.
            MalformedMessage: the message is invalid in another way.
        """
        header = Header.from_message(body)
        raw = _decompress(header.packed, header.raw_bytes)
        at = 4 * header.n
        lengths = struct.unpack_from(f"<{header.n}I", raw) if at <= len(raw) else ()
        if at + sum(lengths) != len(raw):
            raise MalformedMessage(
                f"The lengths of the texts do not add up to the declared {len(raw):,} bytes."
            )
        refused = dict(header.refused)
        texts: list[str] = []
        # One check of all texts: a check of each text would delay the device.
        all_valid = max(lengths, default=0) <= MAX_TEXT_BYTES and raw.find(b"\0", at) < 0
        for offset, length in enumerate(lengths):
            text = ""
            try:
                text = raw[at : at + length].decode()
            except UnicodeDecodeError:
                refused.setdefault(offset, Code.NOT_UNICODE)
            if not all_valid and (code := refusal(text)):
                refused.setdefault(offset, code)
            texts.append("" if offset in refused else text)
            at += length
        return cls(header.job, header.index, texts, header.spec, refused, header.rerouted)


def message_headers(body: Mapping[str, Any], published: float) -> dict[str, Any]:
    """Return Celery options with the publish time, and without texts in headers, events and Flower.

    Args:
        body: message from EmbedBatch.to_message.
        published: Unix time of the publish, seconds; used to find lost batches and queue ages.
    """
    return {
        # Celery's default repr contains the start of the texts.
        "argsrepr": f"<{body['n']} texts, {body['raw'] / 1000:.0f} kB>",
        "kwargsrepr": "{}",
        "headers": {PUBLISHED_HEADER: published},
    }


def _decompress(packed: bytes, size: int) -> bytes:
    window = zstd.DecompressionParameter.window_log_max
    # zstd rejects a frame with a window above 2**23 bytes before it allocates memory.
    decoder = zstd.ZstdDecompressor(options={window: 23})
    try:
        raw: bytes = decoder.decompress(packed, max_length=size + 1)
    except zstd.ZstdError:
        raise MalformedMessage("The texts field is not a valid zstd frame.") from None
    if len(raw) != size or not decoder.eof or decoder.unused_data:
        raise MalformedMessage(
            f"The texts field does not decompress to the declared {size:,} bytes."
        )
    return raw
