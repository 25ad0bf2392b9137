"""One job: batches out within a window, commits in, vectors back in the caller's order."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from redis import Redis

from embedq import progress
from embedq.batching import Slice
from embedq.broker import Broker
from embedq.contract import MAX_BATCHES, Outcome, Queue, Status, VectorSpec
from embedq.errors import (
    BatchTooLarge,
    CorruptValue,
    QueueUnavailable,
    ResultExpired,
    ResultTimeout,
)
from embedq.gate import Gate
from embedq.ledger import Commit, Ledger
from embedq.message import EmbedBatch
from embedq.outcomes import TRUNCATED, OutcomeTable
from embedq.patience import OnWait, patiently
from embedq.publisher import Publisher
from embedq.reconcile import Sent, View, is_lost, is_missing
from embedq.tracing import JobTrace
from embedq.vectors import DESCRIPTIONS, Value, Vectors, decode

T = TypeVar("T")
#: Milliseconds that one read of the stream waits before the job looks around.
READ_BLOCK_MS = 1_000
#: Seconds that a job which is left in its middle waits for a Redis that went away.
CLOSE_PATIENCE_S = 2.0
#: Seconds between two notes of how far the job is, for whoever watches it from outside.
TELL_EVERY_S = 1.0
#: Commits taken in one read.
READ_COUNT = 32
#: Seconds between two looks for lost batches, and the age at which a batch is looked for.
RECONCILE_EVERY_S, RECONCILE_AFTER_S = 5.0, 10.0
#: Times a batch whose stored vectors were lost or damaged is computed again.
MAX_RECOMPUTES = 3


@dataclass(frozen=True, slots=True)
class Link:
    """What a job talks through.

    Attributes:
        redis: of the results.
        broker: the queues, looked at from outside Celery.
        publisher: of the broker.
        patience_s: how long to wait for a Redis that went away.
        visibility_timeout_s: the fleet's lease on a batch.
        on_wait: told what is waited for.
        on_idle: called about every second while nothing arrives; may raise to end the job.
    """

    redis: Redis
    broker: Broker
    publisher: Publisher
    patience_s: float
    visibility_timeout_s: float
    on_wait: OnWait
    on_idle: Callable[[], None]


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


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is.

    Attributes:
        published: batches sent so far.
        texts: texts handed out, with their failed and truncated ones.
        failed, truncated: how many of these.
        finished: nothing more will come.
    """

    published: int
    texts: int
    failed: int
    truncated: int
    finished: bool


@dataclass(slots=True)
class _Outstanding:
    slice: Slice
    sent: Sent
    recomputes: int = 0


@dataclass(slots=True)
class _State:
    """What a running job remembers; bounded by its window."""

    outstanding: dict[int, _Outstanding] = field(default_factory=dict)
    ready: dict[int, FinishedBatch] = field(default_factory=dict)
    cursor: bytes = b"0-0"
    published: int = 0
    sent_texts: int = 0
    told: float = 0.0
    yielded: int = 0
    first: int = 0
    texts: int = 0
    failed: int = 0
    truncated: int = 0
    open: bool = False
    closed: bool = False
    kept_alive: float = field(default_factory=time.monotonic)
    exhausted: bool = False


class Job:
    """A stream of batches on its way through the queue. For one thread at a time."""

    def __init__(
        self,
        link: Link,
        spec: VectorSpec,
        slices: Iterable[Slice],
        *,
        queue: Queue,
        window: Callable[[], int],
        ttl_s: int,
        ordered: bool = True,
        label: str = "",
        refusable: bool = True,
        planned: int | None = None,
    ) -> None:
        """Prepare a job; nothing is sent before it is started or read.

        Args:
            link: Redis and publisher.
            spec: what shapes the vectors.
            slices: the batches with consecutive indices from any first one, pulled only as fast
                as the window allows.
            queue: where they go.
            window: tells the most batches that may be published and not yet handed out.
            ttl_s: life of the job in Redis after its last sign of life.
            ordered: hand batches out in their order, or as they complete.
            label: shown to operators.
            refusable: refused by a Redis that is nearly full; otherwise it waits for room.
            planned: texts of the whole job, shown to operators; None if that is not known yet.
        """
        self.id = secrets.token_hex(8)
        self._link = link
        self._spec = spec
        self._fingerprint = spec.fingerprint()
        self._slices = iter(slices)
        self._queue = queue
        self._window = window
        self._ttl_s = ttl_s
        self._ordered = ordered
        self._label = label
        self._refusable = refusable
        self._planned = planned
        self._ledger = Ledger(link.redis, self.id)
        self._state = _State()
        self._kept: deque[FinishedBatch] = deque()
        self._gate = Gate(link.redis, link.broker, link.on_wait)
        self._looked = time.monotonic()
        self._trace = JobTrace(self.id)

    def start(self) -> None:
        """Publish the first window; `batches`, `results` and `wait` do it by themselves.

        Raises:
            QueueUnavailable: Redis cannot be reached.
            QueueFull: Redis has no room for another job, and this one does not wait for it.
        """
        if not self._state.open:
            if self._refusable:
                self._patiently(self._gate.require_room)
            self._patiently(self._open)
            self._trace.begin()
            self._state.open = True
            self._publish_up_to_window()

    def progress(self) -> JobProgress:
        """Return how far the job is, without asking Redis."""
        state = self._state
        return JobProgress(
            published=state.published,
            texts=state.texts,
            failed=state.failed,
            truncated=state.truncated,
            finished=state.closed,
        )

    def batches(self, *, timeout_s: float | None = None) -> Iterator[FinishedBatch]:
        """Yield each batch once; leaving early cancels the rest.

        Args:
            timeout_s: longest silence between two commits, in seconds; None waits for ever.

        Raises:
            QueueUnavailable: Redis stayed away longer than our patience.
            ResultTimeout: no commit arrived for timeout_s.
            ResultExpired: vectors were lost in Redis again and again.
        """
        try:
            while (batch := self._next(timeout_s)) is not None:
                yield batch
        finally:
            self._close()

    def results(self, *, timeout_s: float | None = None) -> Iterator[Embedded]:
        """Yield each text's vector and outcome, in the caller's order if the job is ordered.

        Args, Raises: as `batches`.
        """
        for batch in self.batches(timeout_s=timeout_s):
            for row in range(len(batch.slice)):
                position = batch.slice.start + row
                yield Embedded(position, batch.vectors[row], batch.outcomes[row])

    def wait(self, timeout_s: float | None = None) -> JobProgress:
        """Wait until every text has its outcome, keeping the vectors in memory for `results`.

        Raises:
            ResultTimeout: it took longer than timeout_s; the job goes on, wait again.
            QueueUnavailable, ResultExpired: as `batches`.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        arrived: deque[FinishedBatch] = deque(self._kept)
        self._kept.clear()
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                batch = self._next(left)
                if batch is None:
                    break
                arrived.append(batch)
        finally:
            self._kept = arrived
        self._close()
        return self.progress()

    def cancel(self) -> None:
        """Stop the job: what is queued is dropped by the nodes, what is stored is deleted."""
        if self._state.open and not self._state.closed:
            self._patiently(self._ledger.cancel)
        self._close()

    def _next(self, silence_s: float | None) -> FinishedBatch | None:
        """Return the next batch, or None when there is no more."""
        if self._kept:
            return self._kept.popleft()
        if self._state.closed:
            return None
        self.start()
        heard = time.monotonic()
        while (finished := self._hand_out()) is None:
            self._publish_up_to_window()
            if self._state.exhausted and not self._state.outstanding:
                return None
            left_s = None if silence_s is None else heard + silence_s - time.monotonic()
            commits = self._patiently(lambda left_s=left_s: self._read(left_s))  # type: ignore[misc] # the default binds the loop variable
            self._reconcile()
            if commits:
                self._collect(commits)
                heard = time.monotonic()
            elif silence_s is not None and time.monotonic() - heard >= silence_s:
                raise ResultTimeout(
                    f"No batch of job {self.id} arrived for {silence_s:.1f} s; "
                    f"{len(self._state.outstanding)} are outstanding. Look at `embedq status`."
                )
            else:
                self._keep_alive()
                self._link.on_idle()
        self._publish_up_to_window()
        return finished

    def _keep_alive(self) -> None:
        now = time.monotonic()
        if now - self._state.kept_alive > self._ttl_s / 4:
            self._patiently(lambda: self._ledger.keep_alive(self._ttl_s))
            self._state.kept_alive = now

    def _open(self) -> None:
        self._ledger.open(fingerprint=self._fingerprint, ttl_s=self._ttl_s, label=self._label)

    def _read(self, left_s: float | None) -> list[Commit]:
        block_ms = READ_BLOCK_MS
        if left_s is not None:  # to Redis, 0 means for ever
            block_ms = max(1, min(block_ms, int(1e3 * left_s)))
        return self._ledger.read_commits(self._state.cursor, count=READ_COUNT, block_ms=block_ms)

    def _publish_up_to_window(self) -> None:
        exhausted = self._state.exhausted
        self._fill_window()
        self._tell(at_once=self._state.exhausted and not exhausted)

    def _tell(self, *, at_once: bool) -> None:
        """Note how far the job is where operators look."""
        state, now = self._state, time.monotonic()
        if not at_once and now - state.told < TELL_EVERY_S:
            return
        state.told = now
        planned = state.sent_texts if state.exhausted else self._planned
        self._patiently(
            lambda: progress.tell(
                self._link.redis, self.id, published=state.published, planned=planned
            )
        )

    def _fill_window(self) -> None:
        state = self._state
        while not state.exhausted:
            ahead = state.published - state.yielded if self._ordered else len(state.outstanding)
            if ahead >= self._window() or not self._patiently(self._gate.may_publish):
                return
            piece = next(self._slices, None)
            if piece is None:
                state.exhausted = True
                return
            if piece.index >= MAX_BATCHES:
                raise BatchTooLarge(
                    f"The job has more than {MAX_BATCHES:,} batches. Split the input into jobs."
                )
            if not state.published:
                state.first = piece.index
            state.published += 1
            state.sent_texts += len(piece)
            self._publish(piece)

    def _publish(self, piece: Slice, recomputes: int = 0) -> None:
        batch = EmbedBatch(self.id, piece.index, piece.texts, self._spec, piece.refused)
        self._patiently(lambda: self._link.publisher.publish(batch, self._queue, self._trace))
        sent = Sent(batch.task_id, time.time())
        self._state.outstanding[piece.index] = _Outstanding(piece, sent, recomputes)

    def _reconcile(self) -> None:
        """Publish again what Redis has lost; every few seconds, and only what is old enough."""
        if time.monotonic() - self._looked < RECONCILE_EVERY_S:
            return
        self._looked = time.monotonic()
        if not self._patiently(self._ledger.exists):
            self._begin_again()
            return
        now = time.time()
        old = [
            waiting
            for waiting in self._state.outstanding.values()
            if now - waiting.sent.published >= RECONCILE_AFTER_S
        ]
        if not old:
            return
        ids = [waiting.sent.task_id for waiting in old]
        view = self._patiently(lambda: self._link.broker.look(ids, self._link.redis))
        for waiting in old:
            self._judge(waiting, view, now)

    def _judge(self, waiting: _Outstanding, view: View, now: float) -> None:
        timeout_s = self._link.visibility_timeout_s
        if not is_missing(waiting.sent, view, visibility_timeout_s=timeout_s):
            waiting.sent = replace(waiting.sent, missed=None)
            return
        if waiting.sent.missed is None:
            waiting.sent = replace(waiting.sent, missed=now)
        if is_lost(waiting.sent, now, patience_s=RECONCILE_EVERY_S):
            index = waiting.slice.index
            if self._patiently(lambda: self._ledger.is_committed(index)):
                return  # its commit is on the way to us
            self._link.on_wait(f"Batch {index} was lost in Redis; it is published again.")
            self._publish(waiting.slice, waiting.recomputes)

    def _begin_again(self) -> None:
        """Bring a job back to life whose keys were deleted under it, as by FLUSHALL."""
        self._link.on_wait("Redis has forgotten this job; what is outstanding is published again.")
        self._patiently(self._open)
        for waiting in list(self._state.outstanding.values()):
            self._publish(waiting.slice, waiting.recomputes)

    def _hand_out(self) -> FinishedBatch | None:
        state = self._state
        if not state.ready:
            return None
        index = state.first + state.yielded if self._ordered else next(iter(state.ready))
        if index not in state.ready:
            return None
        finished = state.ready.pop(index)
        state.yielded += 1
        state.texts += len(finished.slice)
        state.failed += finished.outcomes.count_failed()
        state.truncated += finished.outcomes.count_flag(TRUNCATED)
        return finished

    def _collect(self, commits: list[Commit]) -> None:
        """Fetch, check and keep the vectors of new commits, then delete them from Redis."""
        for commit in commits:
            with self._trace.collecting(index=commit.index):
                self._collect_one(commit)

    def _collect_one(self, commit: Commit) -> None:
        state = self._state
        waiting = state.outstanding.get(commit.index)
        if waiting is not None:
            values = self._patiently(lambda: self._ledger.fetch_values(commit))
            try:
                finished = self._assemble(waiting.slice, values)
            except CorruptValue as error:
                self._recompute(commit.index, waiting, error)
            else:
                state.ready[commit.index] = finished
                del state.outstanding[commit.index]
        self._patiently(lambda: self._ledger.take([commit]))
        state.cursor = commit.entry

    def _assemble(self, piece: Slice, values: list[bytes | None]) -> FinishedBatch:
        if not values or any(value is None for value in values):
            raise CorruptValue("The vectors of a committed batch have left Redis.")
        parts = [decode(value, self._fingerprint) for value in values if value is not None]
        if parts[0].failure:
            return _failed(piece, parts[0].failure, self._spec)
        vectors, outcomes = _join(parts)
        if vectors.shape != (len(piece), self._spec.dim):
            raise CorruptValue(
                f"A batch came back as {vectors.shape}, expected {(len(piece), self._spec.dim)}."
            )
        return FinishedBatch(piece, vectors, outcomes)

    def _recompute(self, index: int, waiting: _Outstanding, error: CorruptValue) -> None:
        waiting.recomputes += 1
        if waiting.recomputes > MAX_RECOMPUTES:
            raise ResultExpired(
                f"Batch {index} of job {self.id} was computed {MAX_RECOMPUTES} times and its "
                f"vectors were lost or damaged in Redis each time: {error}"
            ) from error
        self._link.on_wait(f"Batch {index} is computed again: {error}")
        self._patiently(self._open)  # in case Redis forgot the whole job
        self._patiently(lambda: self._ledger.forget(index))
        self._publish(waiting.slice, waiting.recomputes)

    def _close(self) -> None:
        """Leave nothing of the job in Redis, as far as Redis lets us; its keys expire anyway."""
        if self._state.closed or not self._state.open:
            self._state.closed = True
            return
        self._state.closed = True
        self._trace.end()
        ended = self._state.exhausted and not self._state.outstanding
        patience_s = self._link.patience_s if ended else CLOSE_PATIENCE_S
        try:
            patiently(self._ledger.drop, patience_s=patience_s, on_wait=self._link.on_wait)
        except QueueUnavailable as error:
            # The caller has its vectors, or a better reason to leave than this one.
            self._link.on_wait(f"What is left of job {self.id} will expire: {error}")

    def _patiently(self, action: Callable[[], T]) -> T:
        return patiently(action, patience_s=self._link.patience_s, on_wait=self._link.on_wait)


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
