"""Texts -> vectors and outcomes: tokenizes ahead while the engine infers.

How texts are grouped depends on the batch alone, never on timing, so the same batch gives the same
bytes again on the same engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq.contract import Code, EmbedBatch, OnLong, Status
from embedq.outcomes import REROUTED, TRUNCATED, OutcomeTable
from embedq_worker.engines.base import Engine
from embedq_worker.errors import InferFailed
from embedq_worker.packing import TokenBatch, build_padded, plan_padded
from embedq_worker.tokens import AnyTokenizer, RaggedTokens

#: Texts tokenized at a time: enough to sort by length, and few enough that the engine waits only
#: 20 to 30 ms for the first of them (62 tokens each, two cores, measured 2026-11-22).
CHUNK_TEXTS: Final = 256

Vectors = npt.NDArray[np.float32]
Indices = npt.NDArray[np.intp]


class Embedder:
    """Embeds batches with one tokenizer and one engine; any thread may call it."""

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        engine: Engine,
        *,
        token_budget: int,
        chunk_texts: int = CHUNK_TEXTS,
    ) -> None:
        """Start the threads that infer and the one that tokenizes.

        Args:
            tokenizer: of the engine's model.
            engine: stays the caller's; close() leaves it open.
            token_budget: most padded tokens in one inference.
            chunk_texts: texts tokenized at a time.
        """
        self.tokenizer = tokenizer
        self.engine = engine
        self._token_budget = token_budget
        self._chunk_texts = chunk_texts
        self._inferring = ThreadPoolExecutor(engine.concurrency, "embedq-infer")
        self._tokenizing = ThreadPoolExecutor(1, "embedq-tokenize")

    def embed(self, batch: EmbedBatch) -> tuple[Vectors, OutcomeTable]:
        """Embed a batch.

        Returns:
            float32 [n, D] in the order of the texts, NaN where a text failed, and its outcomes.

        Raises:
            InferFailed, DeviceLost: the engine cannot be trusted.
            EngineError: the tokenizer failed.
        """
        result = _Result(batch, self.engine)
        inferences: list[Future[None]] = []
        try:
            for rows, tokens in self._tokenize(batch, result.accepted()):
                result.count(rows, tokens)
                for members in self._plan(result, rows, tokens):
                    token_batch = build_padded(tokens, members, self.tokenizer.pad_id)
                    inferences.append(
                        self._inferring.submit(self._infer, token_batch, rows, result.vectors)
                    )
            for inference in inferences:
                inference.result()
        finally:
            _abandon(inferences)
        result.check()
        return result.vectors, result.outcomes()

    def close(self) -> None:
        """Stop the threads; the engine stays open."""
        self._tokenizing.shutdown(cancel_futures=True)
        self._inferring.shutdown(cancel_futures=True)

    def _tokenize(
        self, batch: EmbedBatch, accepted: Indices
    ) -> Iterator[tuple[Indices, RaggedTokens]]:
        """Yield rows of the batch with their tokens; later chunks are under way meanwhile.

        All of them may be: cut to the model's length, the largest batch has 4 MB of tokens.
        """
        prompt = batch.spec.prompt

        def tokenize(rows: Indices) -> RaggedTokens:
            return self.tokenizer.tokenize([prompt + batch.texts[row] for row in rows])

        size = self._chunk_texts
        chunks = [accepted[at : at + size] for at in range(0, len(accepted), size)]
        yield from zip(chunks, self._tokenizing.map(tokenize, chunks), strict=True)

    def _plan(self, result: _Result, rows: Indices, tokens: RaggedTokens) -> list[Indices]:
        """Group the texts of a chunk; groups shrink at the end of the batch, not of each chunk."""
        wanted = np.nonzero(result.wanted(rows))[0]
        is_last = len(rows) > 0 and rows[-1] == result.last
        streams = self.engine.concurrency if is_last else 1
        plan = plan_padded(tokens.lengths[wanted], self._token_budget, streams)
        return [wanted[group] for group in plan]

    def _infer(self, batch: TokenBatch, rows: Indices, vectors: Vectors) -> None:
        """Infer one token batch and put each vector in its row."""
        found = self.engine.infer(batch)  # [B, S, D]
        real = batch.members >= 0
        vectors[rows[batch.members[real]]] = found[real]


class _Result:
    """The rows of a batch while they fill."""

    def __init__(self, batch: EmbedBatch, engine: Engine) -> None:
        n = len(batch.texts)
        self.vectors = np.full((n, engine.dim), np.nan, np.float32)
        self._batch = batch
        self._engine = engine
        self._n_tokens = np.zeros(n, np.uint32)
        self._n_dropped = np.zeros(n, np.uint32)
        self._codes = [str(batch.refused.get(row, Code.NONE)) for row in range(n)]
        self.last = int(self.accepted()[-1]) if len(self.accepted()) else -1

    def accepted(self) -> Indices:
        """Return the rows that have not failed."""
        return np.array([row for row, code in enumerate(self._codes) if not code], np.intp)

    def wanted(self, rows: Indices) -> npt.NDArray[np.bool_]:
        """Say which of these rows have not failed."""
        return np.array([not self._codes[row] for row in rows], bool)

    def count(self, rows: Indices, tokens: RaggedTokens) -> None:
        """Note the tokens of these rows, and fail those that are too long if the job says so."""
        self._n_tokens[rows] = tokens.lengths
        self._n_dropped[rows] = tokens.n_dropped
        if self._batch.spec.on_long is OnLong.ERROR:
            for row in rows[tokens.n_dropped > 0]:
                self._codes[row] = Code.TOO_MANY_TOKENS.value
                self._n_tokens[row] = 0

    def check(self) -> None:
        """Refuse to hand out a vector that is not finite: a device's fault, never a text's.

        Raises:
            InferFailed: there is one.
        """
        rows = self.accepted()
        wrong = int(np.count_nonzero(~np.isfinite(self.vectors[rows]).all(axis=1)))
        if wrong:
            raise InferFailed(
                f"Engine {self._engine.name} on {self._engine.device} gave {wrong:,} of "
                f"{len(rows):,} vectors that are not finite."
            )

    def outcomes(self) -> OutcomeTable:
        """Describe what became of each text."""
        served = (str(Status.OK), str(self._engine.device), str(self._engine.precision), "")
        kinds = {served: 0}
        kind = [
            kinds.setdefault((str(Status.FAILED), "", "", code) if code else served, len(kinds))
            for code in self._codes
        ]
        flags = np.full(len(kind), REROUTED * self._batch.rerouted, np.uint8)
        truncated = np.array([not code for code in self._codes], bool) & (self._n_dropped > 0)
        flags[truncated] |= TRUNCATED
        return OutcomeTable(
            list(kinds), np.array(kind, np.uint8), flags, self._n_tokens, self._n_dropped
        )


def _abandon(inferences: list[Future[None]]) -> None:
    """After a failure, drop what has not begun and wait for the rest: they write into our rows."""
    for inference in inferences:
        inference.cancel()
    wait(inferences)
