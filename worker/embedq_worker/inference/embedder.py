"""Tokenize ahead, infer, collect; check the canary.

A text with a known vector that rides in the last row of each batch on an NPU.

A device that computes wrong vectors raises nothing (openvino issue 37264), so each batch asks it
for one vector that we know. It rides in the row with most room: a static row costs the same however
full it is, so the canary is free wherever some row of the batch has room for its 21 tokens.

The rows of a batch while they fill: vectors, outcomes, and how much was computed for them.

Texts -> vectors and outcomes: tokenizes ahead while the engine infers.

How texts are grouped depends on the batch alone, never on timing, so the same batch gives the same
bytes again on the same engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from embedq.protocol.contract import Code, Device, OnLong, Status
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import REROUTED, TRUNCATED, OutcomeTable, Vectors
from embedq_worker.engines.base import (
    AnyTokenizer,
    Engine,
    RaggedTokens,
    RowFormat,
    RowSpec,
    TokenBatch,
)
from embedq_worker.errors import FailureReason, InferFailed
from embedq_worker.inference.packing import Indices, build_padded, build_rows, build_shared
from embedq_worker.inference.planning import (
    CPU_CHUNKS,
    NPU_CHUNKS,
    ChunkSchedule,
    place_canary,
    plan_padded,
    plan_shared,
    plan_window,
)
from embedq_worker.inference.stats import EngineMeter, EngineStats

#: The text: a whole sentence, yet short enough to find a seat in the last row of most batches.
CANARY_TEXT: Final = (
    "A queue is a promise that work will be done later, and a worker is who keeps it. "
)


#: Smallest cosine between its vector and the reference: the floor of class ``standard``.
MIN_COSINE: Final = 0.999


@dataclass(frozen=True, slots=True)
class Canary:
    """The text in tokens, and its vector.

    Attributes:
        tokens: of the one text.
        vector: float32 [D], from an engine that is trusted.
    """

    tokens: RaggedTokens
    vector: npt.NDArray[np.float32]

    def check(self, found: npt.NDArray[np.float32]) -> None:
        """Compare what a device gave with what is right.

        Args:
            found: float32 [D].

        Raises:
            InferFailed: the device computes wrong vectors.
        """
        if not np.isfinite(found).all():
            raise InferFailed("The canary's vector is not finite.", FailureReason.NOT_FINITE)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = float(np.linalg.norm(found) * np.linalg.norm(self.vector))
            cosine = float(found @ self.vector) / max(lengths, 1e-12)
        # Asked so that NaN fails, as of numbers too large to be multiplied.
        if not cosine >= MIN_COSINE:
            raise InferFailed(
                f"The canary's vector has cosine {cosine:.5f} to the reference; the floor is "
                f"{MIN_COSINE}. The device computes wrong vectors.",
                FailureReason.WRONG_CANARY,
            )


class RowSink(Protocol):
    """Takes rows as they become final, while others are still computed."""

    def on_rows_final(self, answer: BatchResultBuilder, rows: Indices) -> None:
        """Note that these rows are final; called from one thread, and must not wait."""


class BatchResultBuilder:
    """Collects what becomes of a batch; rows of different texts may be filled from any thread."""

    def __init__(
        self, batch: EmbedBatch, engine: Engine, stats: EngineStats, sink: RowSink | None = None
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
        self.on_rows_final(np.nonzero(self._failed)[0])

    def accepted(self) -> Indices:
        """Return the rows that have not failed."""
        return np.nonzero(~self._failed)[0]

    def pending(self, rows: Indices) -> Indices:
        """Return the places within ``rows`` that have not failed."""
        return np.nonzero(~self._failed[rows])[0]

    def count_token_batch(self, rows: Indices, tokens: RaggedTokens) -> None:
        """Note the tokens of these rows, and fail those that are too long if the job says so."""
        self._n_tokens[rows] = tokens.lengths
        self._n_dropped[rows] = tokens.n_dropped
        if self._batch.spec.on_long is OnLong.ERROR:
            too_long = rows[tokens.n_dropped > 0]
            self._codes |= dict.fromkeys(too_long.tolist(), Code.TOO_MANY_TOKENS.value)
            self._failed[too_long] = True
            self._n_tokens[too_long] = 0
            self.on_rows_final(too_long)

    def charge(self, batch: TokenBatch) -> None:
        """Note that this token batch is computed."""
        self._stats.inferences += 1
        self._stats.computed_tokens += batch.input_ids.size

    def on_rows_final(self, rows: Indices) -> None:
        """Note that nothing more will happen to these rows."""
        if self._sink is not None and len(rows):
            self._sink.on_rows_final(self, rows)

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
                FailureReason.NOT_FINITE,
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


#: Token batches built ahead for each caller of the engine: none of them waits for one, and building
#: does not fight them for the interpreter while they have plenty.
AHEAD: Final = 8


class _Work(NamedTuple):
    """One token batch to come.

    Attributes:
        batch: its members are indices of ``rows``; one beyond them is the canary.
        rows: the row of the batch that each text belongs to.
    """

    batch: TokenBatch
    rows: Indices


class Embedder:
    """Embeds batches with one tokenizer and one engine; any thread may call it."""

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        engine: Engine,
        *,
        token_budget: int,
        pace: ChunkSchedule | None = None,
        form: RowSpec | None = None,
    ) -> None:
        """Start the threads that infer and the one that tokenizes.

        Args:
            tokenizer: of the engine's model.
            engine: stays the caller's; close() leaves it open.
            token_budget: most padded tokens in one inference; static rows have their own size.
            pace: how many texts are tokenized at a time; None suits the engine's device.
            form: of the token batches; None for the engine's own.
        """
        self.tokenizer = tokenizer
        self.engine = engine
        self.form = form or engine.row_spec
        #: Rides in every batch once it is set.
        self.canary: Canary | None = None
        #: How busy the engine is.
        self.meter = EngineMeter()
        self._token_budget = token_budget
        self._pace = pace or (CPU_CHUNKS if engine.device is Device.CPU else NPU_CHUNKS)
        self._inferring = ThreadPoolExecutor(engine.concurrency, "embedq-infer")
        self._tokenizing = ThreadPoolExecutor(1, "embedq-tokenize")

    def embed(
        self, batch: EmbedBatch, stats: EngineStats | None = None, sink: RowSink | None = None
    ) -> tuple[Vectors, OutcomeTable]:
        """Embed a batch.

        Args:
            batch: the texts.
            stats: what this call computed is added here; calls at the same time have their own.
            sink: told of rows as they become final; none of them counts unless this returns.

        Returns:
            float32 [n, D] in the order of the texts, NaN where a text failed, and its outcomes.

        Raises:
            InferFailed, DeviceLost: the engine cannot be trusted.
            EngineError: the tokenizer failed.
        """
        stats = stats or EngineStats()
        own = EngineMeter()  # the engine's meter counts the other callers as well
        answer = BatchResultBuilder(batch, self.engine, stats, sink)
        plan = self._plan_rows if self.form.is_static else self._plan_groups
        inferences: deque[Future[Indices]] = deque()
        most = AHEAD * self.engine.concurrency
        try:
            for work in plan(batch, answer):
                answer.charge(work.batch)
                inferences.append(self._inferring.submit(self._infer, work, answer.vectors, own))
                while inferences and (inferences[0].done() or len(inferences) > most):
                    answer.on_rows_final(inferences.popleft().result())
            while inferences:
                answer.on_rows_final(inferences.popleft().result())
        finally:
            _abandon(inferences)
            measured = own.totals()
            stats.infer_s += measured.infer_s
            stats.busy_s += measured.busy_s
        return answer.finish()

    def close(self) -> None:
        """Stop the threads; the engine stays open."""
        self._tokenizing.shutdown(cancel_futures=True)
        self._inferring.shutdown(cancel_futures=True)

    def _tokenize(
        self, batch: EmbedBatch, answer: BatchResultBuilder
    ) -> Iterator[tuple[Indices, RaggedTokens]]:
        """Yield rows of the batch with their tokens; later chunks are under way meanwhile.

        All of them may be: cut to the model's length, the largest batch has 4 MB of tokens.
        """
        prompt = batch.spec.prompt

        def tokenize(rows: Indices) -> RaggedTokens:
            return self.tokenizer.tokenize([prompt + batch.texts[row] for row in rows])

        accepted = answer.accepted()
        chunks = np.split(accepted, np.cumsum(self._pace.sizes(len(accepted)))[:-1])
        if not len(accepted):
            return
        # The first here, and the others once it is on its way: the engine waits for it, and two
        # threads at Python's one lock would take twice as long (7 ms instead of 3).
        tokens = tokenize(chunks[0])
        answer.count_token_batch(chunks[0], tokens)
        yield chunks[0], tokens
        for rows, tokens in zip(
            chunks[1:], self._tokenizing.map(tokenize, chunks[1:]), strict=True
        ):
            answer.count_token_batch(rows, tokens)
            yield rows, tokens

    def _plan_groups(self, batch: EmbedBatch, answer: BatchResultBuilder) -> Iterator[_Work]:
        """Group each chunk as it comes; groups shrink at the end of the batch, not of a chunk."""
        for rows, tokens in self._tokenize(batch, answer):
            streams = self.engine.concurrency if rows[-1] == answer.last else 1
            grouped = build_groups(
                tokens,
                answer.pending(rows),
                self.tokenizer.pad_id,
                self.form,
                self._token_budget,
                streams,
            )
            for group in grouped:
                yield _Work(group, rows)

    def _plan_rows(self, batch: EmbedBatch, answer: BatchResultBuilder) -> Iterator[_Work]:
        """Assign texts to static rows, window by window; a row that is not full yet waits for one.

        The canary rides in the last row of the batch.
        """
        rows, tokens = np.empty(0, np.intp), RaggedTokens.join([])
        asked = False
        for new_rows, new_tokens in self._tokenize(batch, answer):
            wanted = answer.pending(new_rows)
            n_waiting = len(rows)
            rows = np.concatenate([rows, new_rows[wanted]])
            tokens = RaggedTokens.join([tokens, new_tokens.take(wanted)])
            last = bool(new_rows[-1] == answer.last)
            asked |= len(rows) > 0
            window = plan_window(tokens.lengths, self.form, n_waiting, last=last)
            plan = window.rows
            ahead = tokens
            if last and self.canary and asked:
                ahead = RaggedTokens.join([tokens, self.canary.tokens])
                plan = place_canary(plan, ahead.lengths, self.form, canary=len(rows))
            for row in build_rows(ahead, plan, self.tokenizer.pad_id, self.form):
                yield _Work(row, rows)
            rows, tokens = rows[window.kept], tokens.take(window.kept)

    def _infer(self, work: _Work, vectors: Vectors, own: EngineMeter) -> Indices:
        """Infer one token batch, ask the canary, put each vector in its row; return these rows."""
        batch, rows = work
        with self.meter.inferring(), own.inferring():
            found = self.engine.infer(batch)  # [B, S, D]
        if self.canary:
            for row, seat in np.argwhere(batch.members == len(rows)):
                self.canary.check(found[row, seat])
        real = (batch.members >= 0) & (batch.members < len(rows))
        placed = rows[batch.members[real]]
        vectors[placed] = found[real]
        return placed


def build_groups(
    tokens: RaggedTokens,
    texts: Indices,
    pad_id: int,
    form: RowSpec,
    token_budget: int,
    streams: int = 1,
) -> Iterator[TokenBatch]:
    """Plan and build the token batches of some texts for an engine that takes any shape.

    Args:
        tokens: the tokens of all texts.
        texts: which of them.
        pad_id: token that fills the rest of a row.
        form: padded or shared rows.
        token_budget: most padded tokens in one token batch.
        streams: that are to finish together; 1 if more comes.
    """
    lengths = tokens.lengths[texts]
    if form.format is RowFormat.SHARED:
        for width, rows in plan_shared(lengths, form, token_budget, streams):
            yield build_shared(tokens, [texts[row] for row in rows], pad_id, width)
    else:
        for group in plan_padded(lengths, token_budget, streams):
            yield build_padded(tokens, texts[group], pad_id)


def _abandon(inferences: Collection[Future[Indices]]) -> None:
    """After a failure, drop what has not begun and wait for the rest: they write into our rows."""
    for inference in inferences:
        inference.cancel()
    wait(inferences)
