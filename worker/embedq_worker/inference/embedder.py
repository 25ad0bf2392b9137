"""Embed the texts of a batch: tokenize ahead of the engine, infer, collect vectors and outcomes.

Grouping depends on the batch alone, never on timing, so the same engine gives the same bytes again.
An NPU that computes wrong vectors raises nothing (openvino issue 37264), so each of its batches
contains a canary: a text with a known vector.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
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
from embedq_worker.inference.packing import (
    Indices,
    build_padded,
    build_rows,
    build_shared,
    exclude_prompt,
    skip_pad_tokens,
)
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

#: Text of the canary: a whole sentence, short enough to fit into a row of most batches.
CANARY_TEXT: Final = (
    "A queue is a promise that work will be done later, and a worker is who keeps it. "
)

#: Smallest cosine between the canary's vector and its reference; the limit of class ``standard``.
MIN_COSINE: Final = 0.999


@dataclass(frozen=True, slots=True)
class Canary:
    """Text with a known vector.

    Attributes:
        tokens: tokens of the text.
        vector: its vector from the reference engine, float32 [D].
    """

    tokens: RaggedTokens
    vector: npt.NDArray[np.float32]

    def check(self, found: npt.NDArray[np.float32]) -> None:
        """Compare the vector that a device computed, float32 [D], with the reference.

        Raises:
            InferFailed: the device computes wrong vectors.
        """
        if not np.isfinite(found).all():
            raise InferFailed("The canary's vector is not finite.", FailureReason.NOT_FINITE)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = float(np.linalg.norm(found) * np.linalg.norm(self.vector))
            cosine = float(found @ self.vector) / max(lengths, 1e-12)
        # `not >=`, because NaN must fail: overflow gives NaN.
        if not cosine >= MIN_COSINE:
            raise InferFailed(
                f"The canary's vector has cosine {cosine:.5f} to the reference; the minimum is "
                f"{MIN_COSINE}. The device computes wrong vectors.",
                FailureReason.WRONG_CANARY,
            )


class RowSink(Protocol):
    """Receives rows as they become final, while others are still computed."""

    def on_rows_final(self, result: BatchResultBuilder, rows: Indices) -> None:
        """Process rows that will not change; called from one thread, must not block."""


class BatchResultBuilder:
    """Collects vectors and outcomes of a batch; threads may fill different rows."""

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
        # Codes of failed texts only: a loop over all texts would keep a fast device waiting.
        self._codes = {row: str(code) for row, code in batch.refused.items()}
        self._failed = np.zeros(n, bool)
        self._failed[list(self._codes)] = True
        accepted = self.accepted()
        self.last = int(accepted[-1]) if len(accepted) else -1
        self.mark_final(np.nonzero(self._failed)[0])

    def accepted(self) -> Indices:
        """Return the rows that have not failed."""
        return np.nonzero(~self._failed)[0]

    def pending(self, rows: Indices) -> Indices:
        """Return the positions within ``rows`` of texts that have not failed."""
        return np.nonzero(~self._failed[rows])[0]

    def add_tokens(self, rows: Indices, tokens: RaggedTokens) -> None:
        """Record the token counts of these rows.

        Rows without tokens fail, and rows that are too long if the job asks so.
        """
        self._n_tokens[rows] = tokens.lengths
        self._n_dropped[rows] = tokens.n_dropped
        self._fail(rows[tokens.lengths == 0], Code.NO_TOKENS)
        if self._batch.spec.on_long is OnLong.ERROR:
            self._fail(rows[tokens.n_dropped > 0], Code.TOO_MANY_TOKENS)

    def _fail(self, rows: Indices, code: Code) -> None:
        self._codes |= dict.fromkeys(rows.tolist(), code.value)
        self._failed[rows] = True
        self._n_tokens[rows] = 0
        self.mark_final(rows)

    def count_inference(self, batch: TokenBatch) -> None:
        """Add one token batch to the statistics."""
        self._stats.inferences += 1
        self._stats.computed_tokens += batch.input_ids.size

    def mark_final(self, rows: Indices) -> None:
        """Forward rows that will not change to the sink."""
        if self._sink is not None and len(rows):
            self._sink.on_rows_final(self, rows)

    def finish(self) -> tuple[Vectors, OutcomeTable]:
        """Return vectors and outcomes of all texts.

        Raises:
            InferFailed: a vector is not finite. That is the device's fault, never the text's.
        """
        wrong = int(np.count_nonzero(~np.isfinite(self.vectors).all(axis=1) & ~self._failed))
        if wrong:
            raise InferFailed(
                f"Engine {self._engine.name} on {self._engine.device}: {wrong:,} of "
                f"{len(self.accepted()):,} vectors are not finite.",
                FailureReason.NOT_FINITE,
            )
        self._stats.tokens += int(self._n_tokens.sum())
        return self.vectors, self.outcomes(0, len(self.vectors))

    def outcomes(self, start: int, stop: int) -> OutcomeTable:
        """Return the outcomes of rows that are final."""
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


#: Token batches built ahead per concurrent inference, so that the engine never waits for one.
AHEAD: Final = 8


class _Work(NamedTuple):
    """One token batch to compute.

    Attributes:
        batch: token batch; its members are indices of ``rows``, and len(rows) is the canary.
        rows: index in the batch of each text.
    """

    batch: TokenBatch
    rows: Indices


class Embedder:
    """Embeds batches with one tokenizer and one engine; may be called from any thread."""

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        engine: Engine,
        *,
        token_budget: int,
        schedule: ChunkSchedule | None = None,
        row_spec: RowSpec | None = None,
        prompt_tokens: Callable[[str], int] | None = None,
        position_pad_id: int | None = None,
    ) -> None:
        """Start one thread that tokenizes and one per concurrent inference.

        Args:
            tokenizer: tokenizer of the engine's model.
            engine: engine to use; close() leaves it open.
            token_budget: maximum number of padded tokens per inference; static rows ignore it.
            schedule: sizes of the chunks; None = by the engine's device.
            row_spec: shape of the token batches; None = the engine's.
            prompt_tokens: counts the tokens of a prompt, which the model does not pool; None for a
                model that pools them.
            position_pad_id: padding token that the model's positions do not count; None for a model
                that counts it.
        """
        self.tokenizer = tokenizer
        self.engine = engine
        self.row_spec = row_spec or engine.row_spec
        #: Added to every batch once it is set.
        self.canary: Canary | None = None
        self.meter = EngineMeter()
        self._token_budget = token_budget
        self._prompt_tokens = prompt_tokens
        self._position_pad_id = position_pad_id
        self._schedule = schedule or (CPU_CHUNKS if engine.device is Device.CPU else NPU_CHUNKS)
        self._inferring = ThreadPoolExecutor(engine.concurrency, "embedq-infer")
        self._tokenizing = ThreadPoolExecutor(1, "embedq-tokenize")

    def embed(
        self, batch: EmbedBatch, stats: EngineStats | None = None, sink: RowSink | None = None
    ) -> tuple[Vectors, OutcomeTable]:
        """Embed a batch.

        Args:
            batch: texts and specification.
            stats: counters to which this call adds; concurrent calls need different ones.
            sink: receives rows as they become final; discard them if this call raises.

        Returns:
            Vectors float32 [n, D] in the order of the texts, NaN where a text failed; outcomes.

        Raises:
            InferFailed, DeviceLost: the device failed or computes wrong vectors.
            EngineError: the tokenizer failed.
        """
        stats = stats or EngineStats()
        call_meter = EngineMeter()  # self.meter counts concurrent calls as well
        result = BatchResultBuilder(batch, self.engine, stats, sink)
        prompt = batch.spec.prompt
        n_unpooled = self._prompt_tokens(prompt) if self._prompt_tokens and prompt else 0
        plan = self._plan_rows if self.row_spec.is_static else self._plan_groups
        inferences: deque[Future[Indices]] = deque()
        max_pending = AHEAD * self.engine.concurrency
        try:
            for work in plan(batch, result):
                if n_unpooled or self._position_pad_id is not None:
                    work = self._adjust(work, n_unpooled)
                result.count_inference(work.batch)
                inferences.append(
                    self._inferring.submit(self._infer, work, result.vectors, call_meter)
                )
                while inferences and (inferences[0].done() or len(inferences) > max_pending):
                    result.mark_final(inferences.popleft().result())
            while inferences:
                result.mark_final(inferences.popleft().result())
        finally:
            _cancel(inferences)
            measured = call_meter.totals()
            stats.infer_s += measured.infer_s
            stats.busy_s += measured.busy_s
        return result.finish()

    def _adjust(self, work: _Work, n_unpooled: int) -> _Work:
        # What few models need: pooling without the prompt, positions without padding tokens. In
        # this order, as the prompt is found by positions that count every token.
        token_batch = work.batch
        if n_unpooled:
            token_batch = exclude_prompt(token_batch, n_unpooled, except_for=len(work.rows))
        if self._position_pad_id is not None:
            token_batch = skip_pad_tokens(token_batch, self._position_pad_id)
        return work._replace(batch=token_batch)

    def close(self) -> None:
        """Stop the threads; the engine stays open."""
        self._tokenizing.shutdown(cancel_futures=True)
        self._inferring.shutdown(cancel_futures=True)

    def _tokenize(
        self, batch: EmbedBatch, result: BatchResultBuilder
    ) -> Iterator[tuple[Indices, RaggedTokens]]:
        # Yields row indices with their tokens. All later chunks are tokenized meanwhile, without a
        # limit: the largest batch, truncated to the model's length, has 4 MB of tokens.
        prompt = batch.spec.prompt

        def tokenize(rows: Indices) -> RaggedTokens:
            return self.tokenizer.tokenize([prompt + batch.texts[row] for row in rows])

        accepted = result.accepted()
        chunks = np.split(accepted, np.cumsum(self._schedule.sizes(len(accepted)))[:-1])
        if not len(accepted):
            return
        # The first chunk is tokenized here before the others start: the engine waits for it, and a
        # second thread would compete for the interpreter lock.
        tokens = tokenize(chunks[0])
        result.add_tokens(chunks[0], tokens)
        yield chunks[0], tokens
        for rows, tokens in zip(
            chunks[1:], self._tokenizing.map(tokenize, chunks[1:]), strict=True
        ):
            result.add_tokens(rows, tokens)
            yield rows, tokens

    def _plan_groups(self, batch: EmbedBatch, result: BatchResultBuilder) -> Iterator[_Work]:
        for rows, tokens in self._tokenize(batch, result):
            # Groups shrink at the end of the batch only, not at the end of each chunk.
            streams = self.engine.concurrency if rows[-1] == result.last else 1
            grouped = build_groups(
                tokens,
                result.pending(rows),
                self.tokenizer.pad_id,
                self.row_spec,
                self._token_budget,
                streams,
            )
            for group in grouped:
                yield _Work(group, rows)

    def _plan_rows(self, batch: EmbedBatch, result: BatchResultBuilder) -> Iterator[_Work]:
        rows, tokens = np.empty(0, np.intp), RaggedTokens.join([])
        has_texts = False
        for new_rows, new_tokens in self._tokenize(batch, result):
            wanted = result.pending(new_rows)
            n_deferred = len(rows)
            rows = np.concatenate([rows, new_rows[wanted]])
            tokens = RaggedTokens.join([tokens, new_tokens.take(wanted)])
            last = bool(new_rows[-1] == result.last)
            has_texts |= len(rows) > 0
            window = plan_window(tokens.lengths, self.row_spec, n_deferred, last=last)
            plan = window.rows
            planned = tokens
            if last and self.canary and has_texts:
                planned = RaggedTokens.join([tokens, self.canary.tokens])
                plan = place_canary(plan, planned.lengths, self.row_spec, canary=len(rows))
            for row in build_rows(planned, plan, self.tokenizer.pad_id, self.row_spec):
                yield _Work(row, rows)
            rows, tokens = rows[window.deferred], tokens.take(window.deferred)

    def _infer(self, work: _Work, vectors: Vectors, call_meter: EngineMeter) -> Indices:
        batch, rows = work
        with self.meter.inferring(), call_meter.inferring():
            found = self.engine.infer(batch)  # [B, S, D]
        if self.canary:
            for row, segment in np.argwhere(batch.members == len(rows)):
                self.canary.check(found[row, segment])
        real = (batch.members >= 0) & (batch.members < len(rows))
        placed = rows[batch.members[real]]
        vectors[placed] = found[real]
        return placed


def build_groups(
    tokens: RaggedTokens,
    texts: Indices,
    pad_id: int,
    row_spec: RowSpec,
    token_budget: int,
    streams: int = 1,
) -> Iterator[TokenBatch]:
    """Plan and build the token batches of some texts for an engine that accepts any shape.

    Args:
        tokens: tokens of all texts.
        texts: indices of the texts to place.
        pad_id: padding token.
        row_spec: padded or shared rows.
        token_budget: maximum number of padded tokens in a token batch.
        streams: number of inferences that are to finish together; 1 if more texts follow.
    """
    lengths = tokens.lengths[texts]
    if row_spec.format is RowFormat.SHARED:
        for width, rows in plan_shared(lengths, row_spec, token_budget, streams):
            yield build_shared(tokens, [texts[row] for row in rows], pad_id, width)
    else:
        for group in plan_padded(lengths, token_budget, streams):
            yield build_padded(tokens, texts[group], pad_id)


def _cancel(inferences: Collection[Future[Indices]]) -> None:
    for inference in inferences:
        inference.cancel()
    wait(inferences)  # those that run write into the vectors of the call
