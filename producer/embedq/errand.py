"""The errand of a job: what its parts share, from its opening in Redis to its end there."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from embedq.contract import Queue, VectorSpec
from embedq.errors import QueueUnavailable
from embedq.job_state import JobState
from embedq.ledger import Ledger
from embedq.link import Link
from embedq.tracing import JobTrace

T = TypeVar("T")

#: Seconds that a job which is left in its middle waits for a Redis that went away.
CLOSE_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class Errand:
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
    link: Link
    queue: Queue
    spec: VectorSpec
    fingerprint: bytes
    ttl_s: int
    label: str
    ledger: Ledger
    trace: JobTrace
    state: JobState

    def patiently(self, action: Callable[[], T]) -> T:
        """Run an action on Redis, and again for as long as usual or as the caller waits.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        left_s = max(0.0, self.state.until - time.monotonic())
        return self.link.patiently(action, min(self.link.patience_s, left_s))

    def open(self) -> None:
        """Make the job known in Redis; again, if Redis has forgotten it.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        self.patiently(
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
        if now - self.state.kept_alive > self.ttl_s / 4:
            self.patiently(lambda: self.ledger.keep_alive(self.ttl_s))
            self.state.kept_alive = now

    def close(self, patience_s: float | None = None) -> None:
        """Leave nothing of the job in Redis, as far as Redis lets us; its keys expire anyway.

        Args:
            patience_s: how long to wait for Redis; None for as long as the job deserves.
        """
        if self.state.closed or not self.state.open:
            self.state.closed = True
            return
        self.state.closed = True
        self.trace.end()
        if patience_s is None:
            patience_s = self.link.patience_s if self.state.is_done() else CLOSE_PATIENCE_S
        try:
            self.link.patiently(self.ledger.drop, patience_s)
        except QueueUnavailable as error:
            # The caller has its vectors, or a better reason to leave than this one.
            self.link.on_wait(f"What is left of job {self.id} will expire: {error}")
