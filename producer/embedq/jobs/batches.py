"""Texts cut into batches, and the result of a batch.

Texts -> bounded batches. Pure: the same texts always give the same split.

Finished batches, put together from what Redis kept of them. Pure: the stored values come in.
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
from embedq.protocol.values import DESCRIPTIONS, OutcomeTable, Value, Vectors, decode

#: Bytes of UTF-8 that make a token of ordinary prose, special tokens aside.
#: Measured on 10,607 docstrings with the MiniLM tokenizer: 316 bytes and 61 tokens on average.
BYTES_PER_TOKEN = 5.2


#: Special tokens of a text.
SPECIAL_TOKENS = 2


#: Estimated tokens of a full batch where the setting leaves it to the fleet: about two seconds of a
#: CPU with two cores, and one to two of a device of 2,000 to 4,000 texts a second.
CPU_BATCH_TOKENS = 30_000


DEVICE_BATCH_TOKENS = 262_144


#: The first batches of a job are this share of a full one, so that a worker has work at once and
#: the first results come soon.
RAMP = (0.125, 0.25, 0.5)


@dataclass(frozen=True, slots=True)
class TextBatch:
    """A run of consecutive texts that travels as one batch.

    Attributes:
        index: number of the batch in its job.
        start: position of its first text in the job.
        texts: the texts; a refused one is an empty string.
        refused: offset -> code of each text that cannot be embedded.
    """

    index: int
    start: int
    texts: list[str] = field(repr=False)
    refused: dict[int, str]

    def __len__(self) -> int:
        return len(self.texts)


def guess_tokens(n_bytes: int, max_length: int) -> float:
    """Guess from its size how many tokens of a text the model takes, special tokens included."""
    return min(n_bytes / BYTES_PER_TOKEN + SPECIAL_TOKENS, max_length)


def batch_tokens(setting: int, devices: Iterable[str]) -> int:
    """Return the estimated tokens at which a batch is full.

    Args:
        setting: fixed by the user; 0 leaves it to the fleet.
        devices: what the living workers that may serve the job compute on.
    """
    slow = all(device == Device.CPU for device in devices)
    return setting or (CPU_BATCH_TOKENS if slow else DEVICE_BATCH_TOKENS)


def split(
    texts: Iterable[object], *, max_texts: int, max_tokens: int, max_length: int
) -> Iterator[TextBatch]:
    """Cut a stream of texts into batches of about equal work.

    Args:
        texts: anything; what is not an embeddable string is refused in place.
        max_texts: most texts in a batch.
        max_tokens: estimated tokens at which a batch is full.
        max_length: tokens that the model takes of one text; more cost nothing.

    Yields:
        Slices in order, covering every text.
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
    """A batch that has its answer.

    Attributes:
        slice: the texts.
        vectors: float32 [n, D]; failed texts are NaN.
        outcomes: one per text.
        failure: (code, detail) if the worker refused the batch as a whole.
    """

    slice: TextBatch
    vectors: Vectors
    outcomes: OutcomeTable
    failure: tuple[str, str] | None = None

    def failures(self) -> dict[int, str]:
        """Return position in the job -> code, for each text without a vector."""
        outcomes = self.outcomes
        bad = {i for i, kind in enumerate(outcomes.kinds) if kind[0] != Status.OK}
        if not bad:
            return {}
        rows = np.flatnonzero(np.isin(outcomes.kind, list(bad)))
        return {self.slice.start + int(row): outcomes[int(row)].code for row in rows}


class VectorBuffer:
    """The vectors of a job one after the other, copied as they come: at its end nothing is left."""

    def __init__(self, spec: VectorSpec, planned: int | None) -> None:
        """Take room for what is planned; more of it is taken when that is not enough.

        Args:
            spec: what shapes the vectors.
            planned: how many will come; None if nobody knows.
        """
        self._room: Vectors = np.empty((planned or 0, spec.dim), DESCRIPTIONS[spec.dtype])
        self._n = 0

    def append(self, vectors: Vectors) -> None:
        """Add the vectors [n, D] of a batch."""
        start, self._n = self._n, self._n + len(vectors)
        if self._n > len(self._room):
            before = self._room[:start]
            self._room = np.empty((2 * self._n, *before.shape[1:]), before.dtype)
            self._room[:start] = before
        self._room[start : self._n] = vectors

    def vectors(self) -> Vectors:
        """Return what came, [n, D]; memory that was never written to costs nothing."""
        return self._room[: self._n]


@dataclass(frozen=True, slots=True)
class Embedding:
    """One text with its vector.

    Attributes:
        id: what the caller named it; its position where there is no name.
        vector: float32 [D]; NaN if it failed.
        outcome: what became of it.
    """

    id: str | int
    vector: Vectors
    outcome: Outcome


def decode_result(
    piece: TextBatch, values: Sequence[bytes | None], spec: VectorSpec, fingerprint: bytes
) -> BatchResult:
    """Put a batch together from the values of its commit.

    Args:
        piece: its texts.
        values: as Redis kept them; None for one that is gone.
        spec: what was to shape the vectors.
        fingerprint: of the spec.

    Raises:
        CorruptValue: a value is gone, damaged, or not of this batch.
    """
    if not values or any(value is None for value in values):
        raise CorruptValue("The vectors of a committed batch have left Redis.")
    parts = [decode(value, fingerprint) for value in values if value is not None]
    if parts[0].failure:
        return _failed(piece, parts[0].failure, spec)
    row = (spec.dim, np.dtype(DESCRIPTIONS[spec.dtype]))
    if any((part.vectors.shape[1], part.vectors.dtype) != row for part in parts):
        raise CorruptValue("A batch came back with rows of another length or type.")
    vectors, outcomes = _join(parts)
    if len(vectors) != len(piece):
        raise CorruptValue(f"A batch came back with {len(vectors)} rows, expected {len(piece)}.")
    if _has_bad_vectors(vectors, outcomes):
        raise CorruptValue("A batch came back with vectors that are not finite.")
    return BatchResult(piece, vectors, outcomes)


def _has_bad_vectors(vectors: Vectors, outcomes: OutcomeTable) -> bool:
    """Tell whether a text that is said to be embedded has no finite vector."""
    ok = np.array([kind[0] == Status.OK for kind in outcomes.kinds], bool)[outcomes.kind]
    return bool((ok & ~np.isfinite(vectors).all(axis=1)).any())


def _join(parts: list[Value]) -> tuple[Vectors, OutcomeTable]:
    if len(parts) == 1:
        return parts[0].vectors, parts[0].outcomes
    return (
        np.concatenate([part.vectors for part in parts]),
        OutcomeTable.concatenate([part.outcomes for part in parts]),
    )


def _failed(piece: TextBatch, failure: tuple[str, str], spec: VectorSpec) -> BatchResult:
    outcome = Outcome(status=Status.FAILED, code=failure[0])
    outcomes = OutcomeTable.from_outcomes([outcome] * len(piece))
    vectors: Vectors = np.full((len(piece), spec.dim), np.nan, DESCRIPTIONS[spec.dtype])
    return BatchResult(piece, vectors, outcomes, failure)


@dataclass(frozen=True, slots=True)
class Document:
    """One document of an input.

    Attributes:
        id: its name; the line number where the file gives none.
        text: what to embed; not always a string, and then it fails alone.
        named: the file gave the id; else it is the number of the line.
    """

    id: str | int
    text: object = field(repr=False)
    named: bool = True
