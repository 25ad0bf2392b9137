"""Finished batches, put together from what Redis kept of them. Pure: the stored values come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embedq.batching import Slice
from embedq.contract import Outcome, Status, VectorSpec
from embedq.errors import CorruptValue
from embedq.outcomes import OutcomeTable
from embedq.vectors import DESCRIPTIONS, Value, Vectors, decode


@dataclass(frozen=True, slots=True)
class FinishedBatch:
    """A batch that has its answer.

    Attributes:
        slice: the texts.
        vectors: float32 [n, D]; failed texts are NaN.
        outcomes: one per text.
        failure: (code, detail) if the worker refused the batch as a whole.
    """

    slice: Slice
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


class Rows:
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
class Embedded:
    """One text with its vector.

    Attributes:
        id: what the caller named it; its position where there is no name.
        vector: float32 [D]; NaN if it failed.
        outcome: what became of it.
    """

    id: str | int
    vector: Vectors
    outcome: Outcome


def assemble(
    piece: Slice, values: Sequence[bytes | None], spec: VectorSpec, fingerprint: bytes
) -> FinishedBatch:
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
    return FinishedBatch(piece, vectors, outcomes)


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


def _failed(piece: Slice, failure: tuple[str, str], spec: VectorSpec) -> FinishedBatch:
    outcome = Outcome(status=Status.FAILED, code=failure[0])
    outcomes = OutcomeTable.from_outcomes([outcome] * len(piece))
    vectors: Vectors = np.full((len(piece), spec.dim), np.nan, DESCRIPTIONS[spec.dtype])
    return FinishedBatch(piece, vectors, outcomes, failure)
