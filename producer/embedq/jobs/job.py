"""Job: publish, collect, hand out.

The collector of a job: reads its commits, fetches their vectors and deletes them from Redis.

One job: batches out within a window, commits in, vectors back in the caller's order.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from embedq.errors import CorruptValue, ResultExpired, ResultTimeout
from embedq.jobs.batches import BatchResult, Embedding, TextBatch, decode_result
from embedq.jobs.recovery import LostBatchRecovery
from embedq.jobs.sender import BatchSender
from embedq.jobs.state import (
    CLOSE_RETRY_TIMEOUT_S,
    InFlightBatch,
    JobContext,
    JobProgress,
)
from embedq.store.ledger import Commit

#: Milliseconds that one read of the stream waits before the job looks around.
READ_BLOCK_MS = 1_000


#: Commits taken in one read.
READ_COUNT = 32


#: Times a batch whose stored vectors were lost or damaged is computed again.
MAX_RECOMPUTES = 3


class Collector:
    """Brings batches back, and has them computed again whose vectors did not survive in Redis."""

    def __init__(self, context: JobContext, pump: BatchSender) -> None:
        self._context = context
        self._pump = pump

    def read(self, left_s: float | None) -> list[Commit]:
        """Return new commits, waiting about a second for them, and never longer than left_s.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        block_ms = READ_BLOCK_MS
        if left_s is not None:  # to Redis, 0 means for ever
            block_ms = max(1, min(block_ms, int(1e3 * left_s)))
        ledger = self._context.ledger
        return self._context.redis.call(
            lambda: ledger.read_commits(count=READ_COUNT, block_ms=block_ms)
        )

    def collect(self, commits: list[Commit]) -> None:
        """Fetch, check and keep the vectors of new commits, then delete them from Redis.

        Raises:
            ResultExpired: vectors were lost in Redis again and again.
            QueueUnavailable: Redis stayed away.
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
                finished = decode_result(waiting.slice, values, context.spec, context.fingerprint)
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
                f"Batch {commit.index} of job {context.id} was computed {MAX_RECOMPUTES} times and "
                f"its vectors were lost or damaged in Redis each time: {error}"
            ) from error
        context.redis.on_wait(f"Batch {commit.index} is computed again: {error}")
        context.open()  # in case Redis forgot the whole job
        context.redis.call(lambda: context.ledger.invalidate(commit))
        self._pump.publish(waiting.slice, waiting.recomputes)


class Job:
    """A stream of batches on its way through the queue. For one thread at a time."""

    def __init__(
        self,
        context: JobContext,
        slices: Iterable[TextBatch],
        *,
        window: Callable[[], int],
        refusable: bool = True,
        planned: int | None = None,
    ) -> None:
        """Prepare a job; nothing is sent before it is started or read.

        Args:
            context: its connections and options.
            slices: the batches with consecutive indices from any first one, pulled only as fast
                as the window allows.
            window: tells the most batches that may be published and not yet handed out.
            refusable: refused by a Redis that is nearly full; otherwise it waits for room.
            planned: texts of the whole job, shown to operators; None if that is not known yet.
        """
        self.id = context.id
        self._context = context
        self._refusable = refusable
        self._state = context.state
        self._pump = BatchSender(self._context, iter(slices), window=window, planned=planned)
        self._collector = Collector(self._context, self._pump)
        self._reconciler = LostBatchRecovery(self._context, self._pump)
        self._kept: deque[BatchResult] = deque()

    def start(self) -> None:
        """Publish the first window; `batches`, `results` and `wait` do it by themselves.

        Raises:
            QueueUnavailable: Redis cannot be reached.
            QueueFull: Redis has no room for another job, and this one does not wait for it.
        """
        if not self._state.open:
            if self._refusable:
                self._pump.check_capacity()
            self._context.open()
            self._context.trace.begin()
            self._state.open = True
            self._pump.fill_window()

    def progress(self) -> JobProgress:
        """Return how far the job is, without asking Redis."""
        return self._state.progress()

    def batches(self, *, timeout_s: float | None = None) -> Iterator[BatchResult]:
        """Yield each batch once; leaving early cancels the rest.

        Args:
            timeout_s: longest silence between two commits, in seconds; None waits for ever.

        Raises:
            QueueUnavailable: Redis stayed away longer than our patience.
            ResultTimeout: no commit arrived for timeout_s.
            ResultExpired: vectors were lost in Redis again and again, or this was called before
                and ended with an error.
        """
        try:
            while (batch := self._next(timeout_s)) is not None:
                yield batch
        except GeneratorExit:
            raise
        except BaseException as error:  # Ctrl-C, too: the rest is cancelled
            self._state.error = error
            raise
        finally:
            self._context.close()

    def results(self, *, timeout_s: float | None = None) -> Iterator[Embedding]:
        """Yield each text's vector and outcome, in the caller's order if the job is ordered.

        Args, Raises: as `batches`.
        """
        for batch in self.batches(timeout_s=timeout_s):
            for row in range(len(batch.slice)):
                position = batch.slice.start + row
                yield Embedding(position, batch.vectors[row], batch.outcomes[row])

    def wait(self, timeout_s: float | None = None) -> JobProgress:
        """Wait until every text has its outcome, keeping the vectors in memory for `results`.

        Raises:
            ResultTimeout: it took longer than timeout_s; the job goes on, wait again.
            QueueUnavailable, ResultExpired: as `batches`; also when the caller's iterable raised.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        arrived: deque[BatchResult] = deque(self._kept)
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
        self._context.close()
        return self.progress()

    def cancel(self) -> None:
        """Stop the job: what is queued is dropped by the workers, what is stored is deleted.

        A Redis that is away is waited for a moment only: what is left of the job expires there.
        """
        self._context.close(CLOSE_RETRY_TIMEOUT_S)

    def _next(self, silence_s: float | None) -> BatchResult | None:
        """Return the next batch, or None when there is no more."""
        if self._kept:
            return self._kept.popleft()
        if (broken_by := self._state.error) is not None:
            reason = str(broken_by) or type(broken_by).__name__
            raise ResultExpired(
                f"Job {self.id} has ended, with {self._state.texts:,} texts handed out: "
                f"{reason.removesuffix('.')}. Submit the others in a job of their own."
            ) from broken_by
        if self._state.closed:
            return None
        heard = time.monotonic()
        self._context.redis.deadline = math.inf if silence_s is None else heard + silence_s
        self.start()
        while (finished := self._state.pop_ready()) is None:
            self._pump.fill_window()
            if self._state.is_done():
                return None
            left_s = None if silence_s is None else heard + silence_s - time.monotonic()
            commits = self._collector.read(left_s)
            self._reconciler.run_if_due()
            if commits:
                self._collector.collect(commits)
                heard = time.monotonic()
                self._context.redis.deadline = math.inf if silence_s is None else heard + silence_s
            elif silence_s is not None and time.monotonic() - heard >= silence_s:
                raise ResultTimeout(
                    f"No batch of job {self.id} arrived for {silence_s:.1f} s; "
                    f"{len(self._state.outstanding)} are outstanding. Look at `embedq status`."
                )
            else:
                self._context.keep_alive()
                self._context.on_idle()
        try:
            self._pump.fill_window()
        except BaseException:  # Ctrl-C, too
            self._state.push_back(finished)  # whoever waits again gets it
            raise
        return finished
