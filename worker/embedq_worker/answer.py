"""The rows of a batch while they fill: vectors, outcomes, and how much was computed for them."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedq.contract import Code, OnLong, Status
from embedq.message import EmbedBatch
from embedq.outcomes import REROUTED, TRUNCATED, OutcomeTable
from embedq_worker.engines.base import Engine
from embedq_worker.errors import InferFailed, Reason
from embedq_worker.packing import Indices, TokenBatch
from embedq_worker.tokens import RaggedTokens
from embedq_worker.totals import EngineStats

Vectors = npt.NDArray[np.float32]


class Sink(Protocol):
    """Takes rows as they become final, while others are still computed."""

    def settle(self, answer: Answer, rows: Indices) -> None:
        """Note that these rows are final; called from one thread, and must not wait."""


class Answer:
    """Collects what becomes of a batch; rows of different texts may be filled from any thread."""

    def __init__(
        self, batch: EmbedBatch, engine: Engine, stats: EngineStats, sink: Sink | None = None
    ) -> None:
        n = len(batch.texts)
        self._sink = sink
        self.vectors = np.full((n, engine.dim), np.nan, np.float32)
        self._stats = stats
        self._batch = batch
        self._engine = engine
        self._n_tokens = np.zeros(n, np.uint32)
        self._n_dropped = np.zeros(n, np.uint32)
        # Few texts fail if any: nothing here is done text by text, for the device may be waiting.
        self._codes = {row: str(code) for row, code in batch.refused.items()}
        self._failed = np.zeros(n, bool)
        self._failed[list(self._codes)] = True
        accepted = self.accepted()
        self.last = int(accepted[-1]) if len(accepted) else -1
        self.settle(np.nonzero(self._failed)[0])

    def accepted(self) -> Indices:
        """Return the rows that have not failed."""
        return np.nonzero(~self._failed)[0]

    def wanted(self, rows: Indices) -> Indices:
        """Return the places within ``rows`` that have not failed."""
        return np.nonzero(~self._failed[rows])[0]

    def count(self, rows: Indices, tokens: RaggedTokens) -> None:
        """Note the tokens of these rows, and fail those that are too long if the job says so."""
        self._n_tokens[rows] = tokens.lengths
        self._n_dropped[rows] = tokens.n_dropped
        if self._batch.spec.on_long is OnLong.ERROR:
            too_long = rows[tokens.n_dropped > 0]
            self._codes |= dict.fromkeys(too_long.tolist(), Code.TOO_MANY_TOKENS.value)
            self._failed[too_long] = True
            self._n_tokens[too_long] = 0
            self.settle(too_long)

    def charge(self, batch: TokenBatch) -> None:
        """Note that this token batch is computed."""
        self._stats.inferences += 1
        self._stats.computed_tokens += batch.input_ids.size

    def settle(self, rows: Indices) -> None:
        """Note that nothing more will happen to these rows."""
        if self._sink is not None and len(rows):
            self._sink.settle(self, rows)

    def finish(self) -> tuple[Vectors, OutcomeTable]:
        """Refuse to hand out a vector that is not finite: a device's fault, never a text's.

        Raises:
            InferFailed: there is one.
        """
        wrong = int(np.count_nonzero(~np.isfinite(self.vectors).all(axis=1) & ~self._failed))
        if wrong:
            raise InferFailed(
                f"Engine {self._engine.name} on {self._engine.device} gave {wrong:,} of "
                f"{len(self.accepted()):,} vectors that are not finite.",
                Reason.NOT_FINITE,
            )
        self._stats.tokens += int(self._n_tokens.sum())
        return self.vectors, self.outcomes(0, len(self.vectors))

    def outcomes(self, start: int, stop: int) -> OutcomeTable:
        """Return the outcomes of settled rows."""
        failed = self._failed[start:stop]
        dropped = self._n_dropped[start:stop]
        kinds = {(str(Status.OK), str(self._engine.device), str(self._engine.precision), ""): 0}
        kind = np.zeros(len(failed), np.uint8)
        for row in np.nonzero(failed)[0].tolist():
            why = (str(Status.FAILED), "", "", self._codes[start + row])
            kind[row] = kinds.setdefault(why, len(kinds))
        flags = np.full(len(failed), REROUTED * self._batch.rerouted, np.uint8)
        flags[~failed & (dropped > 0)] |= TRUNCATED
        return OutcomeTable(list(kinds), kind, flags, self._n_tokens[start:stop], dropped)
