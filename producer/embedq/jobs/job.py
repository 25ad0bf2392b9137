"""Runs one job: publishes its batches, collects their vectors and returns them to the caller."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from embedq.errors import CorruptValue, ResultExpired, ResultTimeout
from embedq.jobs.batches import BatchResult, Embedding, TextBatch, decode_result
from embedq.jobs.recovery import LostBatchRecovery
from embedq.jobs.sender import BatchSender
from embedq.jobs.state import CLOSE_RETRY_TIMEOUT_S, InFlightBatch, JobContext, JobProgress
from embedq.store.ledger import Commit

#: Maximum wait of one read of the stream of commits, milliseconds.
READ_BLOCK_MS = 1_000

#: Maximum commits in one read.
READ_COUNT = 32

#: How often a batch is computed again because its vectors were lost or damaged.
MAX_RECOMPUTES = 3


class Collector:
    """Fetches the vectors of committed batches; publishes a batch again whose vectors are lost."""

    def __init__(self, context: JobContext, sender: BatchSender) -> None:
        self._context = context
        self._sender = sender

    def read(self, left_s: float) -> list[Commit]:
        """Return new commits, waiting up to READ_BLOCK_MS and up to left_s for one.

        Raises:
            QueueUnavailable: Redis is unavailable.
        """
        # At least 1, because 0 blocks without a limit.
        block_ms = max(1, int(min(READ_BLOCK_MS, 1e3 * left_s)))
        ledger = self._context.ledger
        return self._context.redis.call(
            lambda: ledger.read_commits(count=READ_COUNT, block_ms=block_ms)
        )

    def collect(self, commits: list[Commit]) -> None:
        """Fetch and verify the vectors of new commits, then delete them from Redis.

        Raises:
            ResultExpired: the vectors of a batch were lost too often.
            QueueUnavailable: Redis is unavailable.
        """
        for commit in commits:
            with self._context.trace.collecting(index=commit.index):
                self._collect_one(commit)

    def _collect_one(self, commit: Commit) -> None:
        context, state = self._context, self._context.state
        waiting = state.outstanding.get(commit.index)
        if waiting is not None:
            values = context.redis.call(lambda: context.ledger.fetch_values(commit))
            try:
                finished = decode_result(
                    waiting.text_batch, values, context.spec, context.fingerprint
                )
            except CorruptValue as error:
                self._recompute(commit, waiting, error)
                return
            state.ready[commit.index] = finished
            del state.outstanding[commit.index]
        context.redis.call(lambda: context.ledger.acknowledge([commit]))

    def _recompute(self, commit: Commit, waiting: InFlightBatch, error: CorruptValue) -> None:
        context = self._context
        waiting.recomputes += 1
        if waiting.recomputes > MAX_RECOMPUTES:
            raise ResultExpired(
                f"Batch {commit.index} of job {context.id} was computed again {MAX_RECOMPUTES} "
                f"times, and its vectors were lost or damaged in Redis each time: {error} "
                "Check that Redis evicts no keys (maxmemory-policy noeviction)."
            ) from error
        context.redis.on_wait(f"Batch {commit.index} is computed again: {error}")
        context.open()  # in case Redis lost the whole job
        context.redis.call(lambda: context.ledger.invalidate(commit))
        self._sender.publish(waiting.text_batch, waiting.recomputes)


class Job:
    """One job and its results. For one thread at a time."""

    def __init__(
        self,
        context: JobContext,
        text_batches: Iterable[TextBatch],
        *,
        window: Callable[[], int],
        refusable: bool = True,
        planned: int | None = None,
    ) -> None:
        """Prepare a job; nothing is published before it is started or read.

        Args:
            context: connections and options.
            text_batches: batches with consecutive indices from any first one, pulled as fast as the
                window allows.
            window: returns the maximum number of batches in flight.
            refusable: a Redis that is nearly full refuses the job; otherwise the job waits.
            planned: texts of the whole job, shown to operators; None if unknown.
        """
        self.id = context.id
        self._context = context
        self._refusable = refusable
        self._state = context.state
        self._sender = BatchSender(
            self._context, iter(text_batches), window=window, planned=planned
        )
        self._collector = Collector(self._context, self._sender)
        self._recovery = LostBatchRecovery(self._context, self._sender)
        self._buffered: deque[BatchResult] = deque()

    def start(self) -> None:
        """Publish the first window; `batches`, `results` and `wait` do it, too.

        Raises:
            QueueUnavailable: Redis is unavailable.
            QueueFull: Redis is nearly full, and the job is refusable.
        """
        if not self._state.open:
            if self._refusable:
                self._sender.check_capacity()
            self._context.open()
            self._context.trace.begin()
            self._state.open = True
            self._sender.fill_window()

    def progress(self) -> JobProgress:
        """Return the progress of the job without reading Redis."""
        state = self._state
        return JobProgress(
            state.published, state.texts, state.failed, state.truncated, finished=state.closed
        )

    def batches(self, *, timeout_s: float | None = None) -> Iterator[BatchResult]:
        """Yield each batch once; closing the iterator early cancels the job.

        Args:
            timeout_s: maximum time between two commits, seconds; None waits without a limit.

        Raises:
            QueueUnavailable: Redis is unavailable.
            ResultTimeout: no commit arrived for timeout_s.
            ResultExpired: the vectors of a batch were lost too often, or the job has ended with
                an error before.
        """
        silence_s = math.inf if timeout_s is None else timeout_s
        try:
            while (batch := self._next(silence_s)) is not None:
                yield batch
        except GeneratorExit:
            raise
        except BaseException as error:  # includes Ctrl-C
            self._state.error = error
            raise
        finally:
            self._context.close()

    def results(self, *, timeout_s: float | None = None) -> Iterator[Embedding]:
        """Yield each text's vector and outcome, in the caller's order if the job is ordered.

        Args, Raises: as `batches`.
        """
        for batch in self.batches(timeout_s=timeout_s):
            for row in range(len(batch.text_batch)):
                position = batch.text_batch.start + row
                yield Embedding(position, batch.vectors[row], batch.outcomes[row])

    def wait(self, timeout_s: float | None = None) -> JobProgress:
        """Wait until every text has its outcome; the vectors stay in memory for `results`.

        Raises:
            ResultTimeout: timeout_s is over; the job continues, and `wait` can be called again.
            QueueUnavailable, ResultExpired: as `batches`.
        """
        deadline = time.monotonic() + (math.inf if timeout_s is None else timeout_s)
        arrived, self._buffered = self._buffered, deque()
        try:
            while (batch := self._next(max(0.0, deadline - time.monotonic()))) is not None:
                arrived.append(batch)
        finally:
            self._buffered = arrived
        self._context.close()
        return self.progress()

    def cancel(self) -> None:
        """Stop the job and delete its vectors; workers skip its queued batches.

        If Redis is unavailable for CLOSE_RETRY_TIMEOUT_S, the keys of the job expire instead.
        """
        self._context.close(CLOSE_RETRY_TIMEOUT_S)

    def _next(self, silence_s: float) -> BatchResult | None:
        if self._buffered:
            return self._buffered.popleft()
        if (error := self._state.error) is not None:
            reason = str(error) or type(error).__name__
            raise ResultExpired(
                f"Job {self.id} has ended, with {self._state.texts:,} texts returned: "
                f"{reason.removesuffix('.')}. Submit the other texts in a new job."
            ) from error
        if self._state.closed:
            return None
        redis = self._context.redis
        redis.deadline = time.monotonic() + silence_s
        self.start()
        while (finished := self._state.pop_ready()) is None:
            self._sender.fill_window()
            if self._state.is_done():
                return None
            commits = self._collector.read(redis.deadline - time.monotonic())
            self._recovery.run_if_due()
            if commits:
                self._collector.collect(commits)
                redis.deadline = time.monotonic() + silence_s
            elif time.monotonic() >= redis.deadline:
                raise ResultTimeout(
                    f"No batch of job {self.id} arrived for {silence_s:.1f} s; "
                    f"{len(self._state.outstanding)} are outstanding. Run `embedq status`."
                )
            else:
                self._context.keep_alive()
                self._context.on_idle()
        try:
            self._sender.fill_window()
        except BaseException:  # includes Ctrl-C
            self._state.push_back(finished)
            raise
        return finished
