"""The words and limits that producer and worker agree on; messages are built of them elsewhere.

Every customer imports this file, so it stays small: no Celery, no Redis, no runtime.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import msgpack

#: Version of the message. A worker answers an older one it still knows and refuses a newer one.
SCHEMA: Final = 1


#: Name of the one Celery task.
TASK_NAME: Final = "embedq.embed_batch"


#: Header of a message with the Unix time at which it was published.
PUBLISHED_HEADER: Final = "published"


#: Most texts in one batch.
MAX_BATCH_TEXTS: Final = 4_096


#: Most bytes of UTF-8 text in one batch, before compression.
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024


#: Most bytes of one text; a longer one fails alone with code ``text_too_large``.
MAX_TEXT_BYTES: Final = 1024 * 1024


#: Most batches in one job: keeps the bitmap of a job below 4 MiB.
MAX_BATCHES: Final = 2**25


#: Most bytes of the raw texts field, framing included.
MAX_RAW_BYTES: Final = MAX_BATCH_BYTES + 8 * MAX_BATCH_TEXTS


class Queue(StrEnum):
    """The queues of Redis that carry batches."""

    NPU = "embed.npu"
    CPU = "embed.cpu"
    CPU_INT8 = "embed.cpu.int8"
    NPU_STRICT = "embed.npu.strict"


class Accuracy(StrEnum):
    """How close a job's vectors must be to the fp32 reference."""

    STANDARD = "standard"
    EXACT = "exact"
    INT8 = "int8"


class Dtype(StrEnum):
    """How vectors travel, are kept in Redis and reach the caller."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class Device(StrEnum):
    """What an engine runs on."""

    NPU = "npu"
    CPU = "cpu"
    STUB = "stub"


class Precision(StrEnum):
    """The arithmetic that made a vector."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"


class OnLong(StrEnum):
    """What happens to a text of more tokens than the model takes."""

    TRUNCATE = "truncate"
    ERROR = "error"


class Status(StrEnum):
    """How a text ended."""

    OK = "ok"
    FAILED = "failed"


class Code(StrEnum):
    """Why a text failed."""

    NONE = ""
    TEXT_TOO_LARGE = "text_too_large"
    NOT_UNICODE = "not_unicode"
    NUL_CHARACTER = "nul_character"
    NOT_A_STRING = "not_a_string"
    TOO_MANY_TOKENS = "too_many_tokens"
    SET_ASIDE = "set_aside"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one text.

    Attributes:
        status: ok or failed.
        truncated: tokens were dropped to fit the model.
        rerouted: the batch was handed from an NPU to the CPU queue.
        n_tokens: tokens embedded, special tokens included.
        n_tokens_dropped: tokens that did not fit.
        device: what computed it.
        precision: the arithmetic that computed it.
        code: why it failed; empty when it did not.
    """

    status: Status = Status.OK
    truncated: bool = False
    rerouted: bool = False
    n_tokens: int = 0
    n_tokens_dropped: int = 0
    device: str = ""
    precision: str = ""
    code: str = ""


class VectorSpec(NamedTuple):
    """Everything beside the text that shapes a vector.

    Attributes:
        model: identity of the model, sha256 in hex of weights, tokenizer and configuration.
        dim: components of a vector.
        max_length: tokens the model takes, special tokens included.
        prompt: put before every text.
        on_long: policy for texts of more tokens.
        accuracy: accuracy class of the job.
        dtype: how vectors travel and are kept; they are computed in float32 whatever it is.
        quantized: name of the quantized model that class ``int8`` computes with; else empty.
    """

    model: str
    dim: int
    max_length: int
    prompt: str = ""
    on_long: OnLong = OnLong.TRUNCATE
    accuracy: Accuracy = Accuracy.STANDARD
    dtype: Dtype = Dtype.FLOAT32
    quantized: str = ""

    def plain(self) -> list[object]:
        """Return the fields in their order, as msgpack takes them."""
        return [str(value) if isinstance(value, StrEnum) else value for value in self]

    def fingerprint(self) -> bytes:
        """Return 8 bytes that differ whenever two specs may give different vectors."""
        packed: bytes = msgpack.packb([SCHEMA, *self.plain()])
        return hashlib.sha256(packed).digest()[:8]


def refusal(text: object) -> Code:
    """Say why a text cannot be embedded, or ``Code.NONE`` if it can.

    An empty text is embedded, as sentence-transformers does. NUL marks binary content, which no
    tokenizer was trained on, so it fails rather than giving a vector that means nothing.
    """
    if not isinstance(text, str):
        return Code.NOT_A_STRING
    # The characters bound the bytes from both sides, so most texts are never encoded here.
    if len(text) > MAX_TEXT_BYTES:
        return Code.TEXT_TOO_LARGE
    if "\0" in text:
        return Code.NUL_CHARACTER
    if text.isascii():
        return Code.NONE
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return Code.NOT_UNICODE
    return Code.TEXT_TOO_LARGE if size > MAX_TEXT_BYTES else Code.NONE
