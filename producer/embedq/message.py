"""The message between producer and worker: the texts of a batch, framed, compressed and named.

Every producer imports this file: no Celery, no Redis, no runtime.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from embedq.contract import (
    MAX_BATCH_BYTES,
    MAX_BATCH_TEXTS,
    MAX_RAW_BYTES,
    MAX_TEXT_BYTES,
    PUBLISHED_HEADER,
    SCHEMA,
    Code,
    VectorSpec,
    refusal,
)
from embedq.errors import BatchTooLarge, MalformedMessage
from embedq.header import Header

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
        rerouted: the batch was handed over from an NPU node.
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
