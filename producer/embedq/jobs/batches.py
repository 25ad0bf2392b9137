"""Splits texts into batches and decodes the results of batches.

Does no I/O. The same texts and limits always give the same batches, so a job can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from embedq.errors import CorruptValue
from embedq.protocol.contract import (
    MAX_BATCH_BYTES,
    Code,
    Device,
    Outcome,
    Status,
    VectorSpec,
    refusal,
)
from embedq.protocol.values import NUMPY_DTYPES, OutcomeTable, Vectors, decode

#: Bytes of UTF-8 per token of English prose, without special tokens.
BYTES_PER_TOKEN = 5.2

#: Special tokens per text.
SPECIAL_TOKENS = 2

#: Estimated tokens of a full batch for a CPU: about two seconds of work.
CPU_BATCH_TOKENS = 30_000

#: Estimated tokens of a full batch for an NPU: one to two seconds of work.
DEVICE_BATCH_TOKENS = 262_144

#: Sizes of the first batches, as shares of a full one, so that the first results arrive early.
RAMP = (0.125, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Consecutive texts of a job that are published as one batch.

    Attributes:
        index: number of the batch in its job.
        start: position of its first text in the job.
        texts: its texts; a refused text is an empty string.
        refused: offset -> code of each text that cannot be embedded.
    """

    index: int
    start: int
    texts: list[str] = field(repr=False)
    refused: dict[int, str]

    def __len__(self) -> int:
        return len(self.texts)


def guess_tokens(n_bytes: int, max_length: int) -> float:
    """Estimate the tokens of a text from its size, special tokens included."""
    return min(n_bytes / BYTES_PER_TOKEN + SPECIAL_TOKENS, max_length)


def batch_tokens(setting: int, devices: Iterable[str]) -> int:
    """Return the estimated tokens at which a batch is full.

    Args:
        setting: `batch_tokens`; 0 chooses by device.
        devices: devices of the living workers that may serve the job.
    """
    slow = all(device == Device.CPU for device in devices)
    return setting or (CPU_BATCH_TOKENS if slow else DEVICE_BATCH_TOKENS)


def split(
    texts: Iterable[object], *, max_texts: int, max_tokens: int, max_length: int
) -> Iterator[TextBatch]:
    """Split texts into batches of about equal work.

    Args:
        texts: any objects; one that is not a valid text is marked as refused.
        max_texts: maximum texts in a batch.
        max_tokens: estimated tokens at which a batch is full.
        max_length: tokens after which the model truncates a text.

    Yields:
        Batches in order, covering every text.
    """
    index = start = 0
    current: list[str] = []
    refused: dict[int, str] = {}
    tokens = size = 0.0
    for text in texts:
        share = RAMP[index] if index < len(RAMP) else 1.0
        code = refusal(text)
        raw = "" if code or not isinstance(text, str) else text
        n_bytes = len(raw) if raw.isascii() else len(raw.encode())
        work = guess_tokens(n_bytes, max_length)
        full = len(current) >= max(1, int(max_texts * share)) or tokens + work > max_tokens * share
        if current and (full or size + n_bytes > MAX_BATCH_BYTES):
            yield TextBatch(index, start, current, refused)
            index, start = index + 1, start + len(current)
            current, refused, tokens, size = [], {}, 0.0, 0.0
        if code is not Code.NONE:
            refused[len(current)] = str(code)
        current.append(raw)
        tokens += work
        size += n_bytes
    if current:
        yield TextBatch(index, start, current, refused)


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch with its vectors.

    Attributes:
        text_batch: its texts.
        vectors: float32 or float16 [n, D]; NaN for a failed text.
        outcomes: one per text.
        failure: (code, detail) if the worker refused the whole batch.
    """

    text_batch: TextBatch
    vectors: Vectors
    outcomes: OutcomeTable
    failure: tuple[str, str] | None = None

    def failures(self) -> dict[int, str]:
        """Return position in the job -> code, for each text without a vector."""
        if not self.outcomes.count_failed():
            return {}
        outcomes = enumerate(self.outcomes, self.text_batch.start)
        return {position: o.code for position, o in outcomes if o.status is not Status.OK}


class VectorBuffer:
    """Collects the vectors of a job in one array, which needs no copy at the end."""

    def __init__(self, spec: VectorSpec, planned: int | None) -> None:
        """Allocate the planned size.

        Args:
            spec: dimension and dtype of the vectors.
            planned: number of vectors; None if unknown.
        """
        self._buffer: Vectors = np.empty((planned or 0, spec.dim), NUMPY_DTYPES[spec.dtype])
        self._n = 0

    def append(self, vectors: Vectors) -> None:
        """Append the vectors [n, D] of a batch."""
        start, self._n = self._n, self._n + len(vectors)
        if self._n > len(self._buffer):
            before = self._buffer[:start]
            # Twice the size: pages that are never written use no memory.
            self._buffer = np.empty((2 * self._n, *before.shape[1:]), before.dtype)
            self._buffer[:start] = before
        self._buffer[start : self._n] = vectors

    def vectors(self) -> Vectors:
        """Return all vectors, [n, D], without a copy."""
        return self._buffer[: self._n]


@dataclass(frozen=True, slots=True)
class Embedding:
    """One text with its vector.

    Attributes:
        id: id given by the caller, else its position.
        vector: float32 or float16 [D]; NaN if it failed.
        outcome: status, code and token count.
    """

    id: str | int
    vector: Vectors
    outcome: Outcome


def decode_result(
    text_batch: TextBatch, values: Sequence[bytes | None], spec: VectorSpec, fingerprint: bytes
) -> BatchResult:
    """Decode and join the values of a committed batch.

    Args:
        text_batch: texts of the batch.
        values: values from Redis; None for a missing one.
        spec: spec of the job.
        fingerprint: fingerprint of the spec.

    Raises:
        CorruptValue: a value is missing, damaged or belongs to another job.
    """
    if not values or any(value is None for value in values):
        raise CorruptValue("The vectors of a committed batch are missing in Redis.")
    parts = [decode(value, fingerprint) for value in values if value is not None]
    if parts[0].failure:
        return _failed(text_batch, parts[0].failure, spec)
    row = (spec.dim, np.dtype(NUMPY_DTYPES[spec.dtype]))
    if any((part.vectors.shape[1], part.vectors.dtype) != row for part in parts):
        raise CorruptValue(
            f"A batch has rows of the wrong shape, expected {spec.dim} x {spec.dtype}."
        )
    vectors = np.concatenate([part.vectors for part in parts])
    outcomes = OutcomeTable.concatenate([part.outcomes for part in parts])
    if len(vectors) != len(text_batch):
        raise CorruptValue(f"A batch has {len(vectors)} rows, expected {len(text_batch)}.")
    ok = np.array([kind[0] == Status.OK for kind in outcomes.kinds], bool)[outcomes.kind]
    if (ok & ~np.isfinite(vectors).all(axis=1)).any():
        raise CorruptValue("A batch has vectors that are not finite.")
    return BatchResult(text_batch, vectors, outcomes)


def _failed(text_batch: TextBatch, failure: tuple[str, str], spec: VectorSpec) -> BatchResult:
    outcome = Outcome(status=Status.FAILED, code=failure[0])
    outcomes = OutcomeTable.from_outcomes([outcome] * len(text_batch))
    vectors: Vectors = np.full((len(text_batch), spec.dim), np.nan, NUMPY_DTYPES[spec.dtype])
    return BatchResult(text_batch, vectors, outcomes, failure)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of an input.

    Attributes:
        id: id from the input, else its line number.
        text: text to embed; one that is not a string fails alone.
        named: whether the input has the id.
    """

    id: str | int
    text: object = field(repr=False)
    named: bool = True
