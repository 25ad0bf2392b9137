"""Defines the enums, limits and value types that producer and worker agree on.

Every user of the SDK imports this module: no Celery, no Redis, no runtime.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

import msgpack

#: Version of the message format. A worker rejects messages of a newer version.
SCHEMA: Final = 1

#: Name of the Celery task.
TASK_NAME: Final = "embedq.embed_batch"

#: Message header with the Unix time of the publish, seconds.
PUBLISHED_HEADER: Final = "published"

#: Maximum number of texts in a batch.
MAX_BATCH_TEXTS: Final = 4_096

#: Maximum UTF-8 size of all texts of a batch before compression, bytes.
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024

#: Maximum UTF-8 size of a text, bytes; a larger one fails alone with code ``text_too_large``.
MAX_TEXT_BYTES: Final = 1024 * 1024

#: Maximum number of batches in a job; limits the job's bitmap of commits to 4 MiB.
MAX_BATCHES: Final = 2**25

#: Maximum size of the texts field before compression, lengths included, bytes.
MAX_RAW_BYTES: Final = MAX_BATCH_BYTES + 8 * MAX_BATCH_TEXTS


class Queue(StrEnum):
    """Redis list that carries batches."""

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
    """Type of the vectors in Redis and in results."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class Device(StrEnum):
    """Device that an engine runs on."""

    NPU = "npu"
    CPU = "cpu"
    STUB = "stub"


class Precision(StrEnum):
    """Arithmetic that computes a vector."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    INT8 = "int8"


class OnLong(StrEnum):
    """Policy for a text with more tokens than the model accepts."""

    TRUNCATE = "truncate"
    ERROR = "error"


class Status(StrEnum):
    """Result of one text."""

    OK = "ok"
    FAILED = "failed"


class Code(StrEnum):
    """Reason why a text failed."""

    NONE = ""
    TEXT_TOO_LARGE = "text_too_large"
    NOT_UNICODE = "not_unicode"
    NUL_CHARACTER = "nul_character"
    NOT_A_STRING = "not_a_string"
    TOO_MANY_TOKENS = "too_many_tokens"
    NO_TOKENS = "no_tokens"
    SET_ASIDE = "set_aside"


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one text, beside its vector.

    Attributes:
        status: ok or failed.
        truncated: tokens were dropped to fit the model.
        rerouted: the batch was moved from an NPU to the CPU queue.
        n_tokens: number of embedded tokens, special tokens included.
        n_tokens_dropped: number of tokens that did not fit.
        device: device that computed the vector; empty if none did.
        precision: arithmetic that computed the vector; empty if none did.
        code: reason of the failure; empty if the text did not fail.
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
    """Everything except the text that determines a vector.

    Attributes:
        model: identity of the model: sha256 of weights, tokenizer and configuration, in hex.
        dim: number of components of a vector.
        max_length: maximum number of tokens of a text, special tokens included.
        prompt: prefix of every text.
        on_long: policy for texts with more than max_length tokens.
        accuracy: accuracy class of the job.
        dtype: type of the stored and returned vectors.
        quantized: name of the quantized model for accuracy class ``int8``; otherwise empty.
    """

    model: str
    dim: int
    max_length: int
    prompt: str = ""
    on_long: OnLong = OnLong.TRUNCATE
    accuracy: Accuracy = Accuracy.STANDARD
    dtype: Dtype = Dtype.FLOAT32
    quantized: str = ""

    def as_list(self) -> list[object]:
        """Return the fields in order, as types that msgpack can encode."""
        return [str(value) if isinstance(value, StrEnum) else value for value in self]

    def fingerprint(self) -> bytes:
        """Return an 8-byte hash of the schema version and all fields."""
        packed: bytes = msgpack.packb([SCHEMA, *self.as_list()])
        return hashlib.sha256(packed).digest()[:8]


def refusal(text: object) -> Code:
    """Return why a text cannot be embedded, or ``Code.NONE`` if it can.

    An empty text is embedded, as in sentence-transformers. A text with a NUL character fails:
    it is binary content, and its vector would be meaningless.
    """
    if not isinstance(text, str):
        return Code.NOT_A_STRING
    # Cheap checks first: most texts need no encoding to be accepted or rejected.
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
