"""Holds the connections, options and state of one job."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from embedq.errors import QueueUnavailable
from embedq.jobs.batches import BatchResult, TextBatch
from embedq.jobs.publisher import Publisher
from embedq.observability.tracing import JobTrace
from embedq.protocol.contract import Queue, VectorSpec
from embedq.protocol.values import TRUNCATED
from embedq.store.connection import RedisConnection
from embedq.store.ledger import Ledger
from embedq.store.queues import QueueInspector

#: Time to wait for Redis when a job is closed before its end, seconds.
CLOSE_RETRY_TIMEOUT_S = 2.0


@dataclass(slots=True)
class JobContext:
    """Connections, options and state of one job, shared by its parts.

    Attributes:
        redis: results Redis; its `call` also retries operations on the broker. Its deadline is
            the time until which the caller of the job waits.
        broker: reads the queues.
        publisher: publishes to the queues.
        visibility_timeout_s: validity of a lease on a batch, seconds.
        on_idle: called about once per second while nothing arrives; may raise to end the job.
        queue: queue of all batches.
        spec: model and options that determine the vectors.
        ttl_s: time after which Redis deletes an idle job, seconds.
        label: shown to operators.
        ordered: batches are returned in their order, not as they complete.
        id: id of the job.
        fingerprint: fingerprint of the spec.
        ledger, trace, state: ledger, trace and state of the job.
    """

    redis: RedisConnection
    broker: QueueInspector
    publisher: Publisher
    visibility_timeout_s: float
    on_idle: Callable[[], None]
    queue: Queue
    spec: VectorSpec
    ttl_s: int
    label: str
    ordered: bool
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    fingerprint: bytes = field(init=False)
    ledger: Ledger = field(init=False)
    trace: JobTrace = field(init=False)
    state: JobState = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = self.spec.fingerprint()
        self.ledger = Ledger(self.redis.client, self.id)
        self.trace = JobTrace(self.id)
        self.state = JobState(self.ordered)

    def open(self) -> None:
        """Create the job in Redis, or create it again if Redis lost it.

        Raises:
            QueueUnavailable: Redis is unavailable.
        """
        self.redis.call(
            lambda: self.ledger.open(
                fingerprint=self.fingerprint, ttl_s=self.ttl_s, label=self.label
            )
        )

    def keep_alive(self) -> None:
        """Extend the life of the job in Redis, if the last extension is a while ago.

        Raises:
            QueueUnavailable: Redis is unavailable.
        """
        now = time.monotonic()
        if now - self.state.last_keepalive > self.ttl_s / 4:
            self.redis.call(lambda: self.ledger.keep_alive(self.ttl_s))
            self.state.last_keepalive = now

    def close(self, retry_timeout_s: float | None = None) -> None:
        """Delete the job from Redis; if Redis is unavailable, its keys expire.

        Args:
            retry_timeout_s: time to wait for Redis, seconds; None waits as long as for any
                operation if the job is complete, else CLOSE_RETRY_TIMEOUT_S.
        """
        was_closed, self.state.closed = self.state.closed, True
        if was_closed or not self.state.open:
            return
        self.trace.end()
        if retry_timeout_s is None:
            retry_timeout_s = math.inf if self.state.is_done() else CLOSE_RETRY_TIMEOUT_S
        self.redis.deadline = time.monotonic() + retry_timeout_s
        try:
            self.redis.call(self.ledger.drop)
        except QueueUnavailable as error:
            # Not raised: the caller has its vectors or a more important error.
            self.redis.on_wait(f"Job {self.id} was not deleted from Redis and will expire: {error}")


@dataclass(frozen=True, slots=True)
class JobProgress:
    """Progress of a job.

    Attributes:
        published: batches published.
        texts: texts returned to the caller, including failed ones.
        failed, truncated: failed and truncated texts among them.
        finished: the job has ended.
    """

    published: int
    texts: int
    failed: int
    truncated: int
    finished: bool


@dataclass(slots=True)
class InFlightBatch:
    """A batch without vectors yet.

    Attributes:
        text_batch: its texts.
        task_id: id of its message.
        published: Unix time of its last publish, seconds.
        recomputes: how often its vectors were lost or damaged.
        missing_since: Unix time of the first check that did not find it, seconds; None if the
            last check found it.
    """

    text_batch: TextBatch
    task_id: str
    published: float
    recomputes: int = 0
    missing_since: float | None = None


@dataclass(slots=True)
class JobState:
    """State of a running job in memory; its size is bounded by the window.

    Attributes:
        ordered: batches are returned in their order, not as they complete.
        outstanding: index -> batch without vectors yet.
        ready: index -> batch with vectors that was not returned yet.
        published, sent_texts: batches and texts published.
        last_reported: time.monotonic() of the last progress report.
        yielded: batches returned.
        first: index of the first batch.
        texts, failed, truncated: all, failed and truncated texts returned.
        open, closed: the job has started, has ended.
        last_keepalive: time.monotonic() of the last extension of its life in Redis.
        exhausted: the caller has no more batches.
        error: error that ended the job early.
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
    exhausted: bool = False
    error: BaseException | None = None

    def in_flight(self) -> int:
        """Return the number of batches that count toward the window."""
        return self.published - self.yielded if self.ordered else len(self.outstanding)

    def is_done(self) -> bool:
        """Return whether every batch was published and has its vectors."""
        return self.exhausted and not self.outstanding

    def pop_ready(self) -> BatchResult | None:
        """Return the next batch and count it as returned; None if none is ready."""
        index = self.first + self.yielded if self.ordered else next(iter(self.ready), -1)
        finished = self.ready.get(index)
        if finished is not None:
            self._count(finished, 1)
            del self.ready[index]
        return finished

    def push_back(self, finished: BatchResult) -> None:
        """Undo pop_ready for a batch that did not reach the caller."""
        self.ready[finished.text_batch.index] = finished
        self._count(finished, -1)

    def _count(self, finished: BatchResult, sign: int) -> None:
        failed = finished.outcomes.count_failed()
        truncated = finished.outcomes.count_flag(TRUNCATED)
        # Counted last, so that Ctrl-C rarely comes between two of these lines.
        self.texts += sign * len(finished.text_batch)
        self.failed += sign * failed
        self.truncated += sign * truncated
        self.yielded += sign
