"""JobContext and JobState.

The link of a job to both Redis, patient while one of them is away.

The errand of a job: what its parts share, from its opening in Redis to its end there.

The state of a running job: what is out, what is back, what was handed on. Asks Redis nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from redis import Redis

from embedq.errors import QueueUnavailable
from embedq.jobs.batches import BatchResult, TextBatch
from embedq.jobs.publisher import Publisher
from embedq.observability.tracing import JobTrace
from embedq.protocol.contract import Queue, VectorSpec
from embedq.protocol.values import TRUNCATED
from embedq.store.connection import OnWait, call_with_retry
from embedq.store.ledger import Ledger
from embedq.store.queues import QueueInspector


@dataclass(frozen=True, slots=True)
class PublishedBatch:
    """A batch that was published and has no commit yet.

    Attributes:
        task_id: of its message.
        published: Unix time of the last publish, in seconds.
        missed: Unix time at which it was first not to be found, None if it was found last time.
    """

    task_id: str
    published: float
    missing_since: float | None = None


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class JobConnections:
    """What a job talks through.

    Attributes:
        redis: of the results.
        broker: the queues, looked at from outside Celery.
        publisher: of the broker.
        where: addresses of both, without passwords.
        patience_s: how long to wait for a Redis that went away.
        visibility_timeout_s: the fleet's lease on a batch.
        on_wait: told what is waited for.
        on_idle: called about every second while nothing arrives; may raise to end the job.
    """

    redis: Redis
    broker: QueueInspector
    publisher: Publisher
    where: str
    retry_timeout_s: float
    visibility_timeout_s: float
    on_wait: OnWait
    on_idle: Callable[[], None]

    def call_with_retry(self, action: Callable[[], T], retry_timeout_s: float | None = None) -> T:
        """Run an action on Redis, and again while it is worth waiting.

        Args:
            action: must be safe to repeat.
            patience_s: how long to wait; None for as long as usual.

        Raises:
            QueueUnavailable: patience ran out, or waiting cannot help.
        """
        if retry_timeout_s is None:
            retry_timeout_s = self.retry_timeout_s
        return call_with_retry(
            action, retry_timeout_s=retry_timeout_s, on_wait=self.on_wait, where=self.where
        )


#: Seconds that a job which is left in its middle waits for a Redis that went away.
CLOSE_RETRY_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class JobContext:
    """What the parts of one job share.

    Attributes:
        id: of the job.
        link: what it talks through.
        queue: where its batches go.
        spec: what shapes the vectors.
        fingerprint: of the spec.
        ttl_s: life of the job in Redis after its last sign of life.
        label: shown to operators.
        ledger: of the job.
        trace: of the job.
        state: what it remembers.
    """

    id: str
    connections: JobConnections
    queue: Queue
    spec: VectorSpec
    fingerprint: bytes
    ttl_s: int
    label: str
    ledger: Ledger
    trace: JobTrace
    state: JobState

    def call_with_retry(self, action: Callable[[], T]) -> T:
        """Run an action on Redis, and again for as long as usual or as the caller waits.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        left_s = max(0.0, self.state.deadline - time.monotonic())
        return self.connections.call_with_retry(
            action, min(self.connections.retry_timeout_s, left_s)
        )

    def open(self) -> None:
        """Make the job known in Redis; again, if Redis has forgotten it.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        self.call_with_retry(
            lambda: self.ledger.open(
                fingerprint=self.fingerprint, ttl_s=self.ttl_s, label=self.label
            )
        )

    def keep_alive(self) -> None:
        """Give a sign of life, if the last one is a while ago.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        now = time.monotonic()
        if now - self.state.last_keepalive > self.ttl_s / 4:
            self.call_with_retry(lambda: self.ledger.keep_alive(self.ttl_s))
            self.state.last_keepalive = now

    def close(self, retry_timeout_s: float | None = None) -> None:
        """Leave nothing of the job in Redis, as far as Redis lets us; its keys expire anyway.

        Args:
            patience_s: how long to wait for Redis; None for as long as the job deserves.
        """
        if self.state.closed or not self.state.open:
            self.state.closed = True
            return
        self.state.closed = True
        self.trace.end()
        if retry_timeout_s is None:
            retry_timeout_s = (
                self.connections.retry_timeout_s if self.state.is_done() else CLOSE_RETRY_TIMEOUT_S
            )
        try:
            self.connections.call_with_retry(self.ledger.drop, retry_timeout_s)
        except QueueUnavailable as error:
            # The caller has its vectors, or a better reason to leave than this one.
            self.connections.on_wait(f"What is left of job {self.id} will expire: {error}")


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
class InFlightBatch:
    """A batch that was published and has not come back.

    Attributes:
        slice: the texts.
        sent: its message.
        recomputes: times its vectors were lost or damaged.
    """

    slice: TextBatch
    sent: PublishedBatch
    recomputes: int = 0


@dataclass(slots=True)
class JobState:
    """What a running job remembers; bounded by its window.

    Attributes:
        ordered: batches are handed out in their order, not as they complete.
        outstanding: index -> batch that has no vectors yet.
        ready: index -> batch that was not handed out yet.
        published, sent_texts: batches and texts sent so far.
        told: time.monotonic() of the last note for operators.
        yielded: batches handed out.
        first: index of the first batch.
        texts, failed, truncated: texts handed out, and how many of them are these.
        open, closed: the job has begun, has ended.
        kept_alive: time.monotonic() of the last sign of life.
        until: time.monotonic() until which the caller waits.
        exhausted: there are no more batches to publish.
        broken_by: what ended the job before its time.
    """

    ordered: bool
    outstanding: dict[int, InFlightBatch] = field(default_factory=dict)
    ready: dict[int, BatchResult] = field(default_factory=dict)
    published: int = 0
    sent_texts: int = 0
    last_reported: float = 0.0
    yielded: int = 0
    first: int = 0
    texts: int = 0
    failed: int = 0
    truncated: int = 0
    open: bool = False
    closed: bool = False
    last_keepalive: float = field(default_factory=time.monotonic)
    deadline: float = math.inf
    exhausted: bool = False
    error: BaseException | None = None

    def in_flight(self) -> int:
        """Return how many batches the window holds."""
        return self.published - self.yielded if self.ordered else len(self.outstanding)

    def is_done(self) -> bool:
        """Tell whether every batch was published and came back."""
        return self.exhausted and not self.outstanding

    def pop_ready(self) -> BatchResult | None:
        """Take the next batch that is ready, or None."""
        if not self.ready:
            return None
        index = self.first + self.yielded if self.ordered else next(iter(self.ready))
        if index not in self.ready:
            return None
        finished = self.ready[index]
        self._count(finished, 1)
        del self.ready[index]
        return finished

    def push_back(self, finished: BatchResult) -> None:
        """Undo the last hand-out: it did not reach the caller."""
        self.ready[finished.slice.index] = finished
        self._count(finished, -1)

    def progress(self) -> JobProgress:
        """Return how far the job is."""
        return JobProgress(
            published=self.published,
            texts=self.texts,
            failed=self.failed,
            truncated=self.truncated,
            finished=self.closed,
        )

    def _count(self, finished: BatchResult, sign: int) -> None:
        failed = finished.outcomes.count_failed()
        truncated = finished.outcomes.count_flag(TRUNCATED)
        # All of it after what takes time: Ctrl-C comes before it, or as good as never.
        self.texts += sign * len(finished.slice)
        self.failed += sign * failed
        self.truncated += sign * truncated
        self.yielded += sign
