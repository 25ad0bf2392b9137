"""Finds lost batches of a job and publishes them again.

Redis removes a message from its queue before the worker can store it as unacknowledged; if the
worker dies in between, the message is lost. Publishing a batch twice is safe, because the ledger
accepts the first commit only. The rules here avoid it for batches that still wait in a queue.
"""

from __future__ import annotations

import time

from embedq.jobs.sender import BatchSender
from embedq.jobs.state import InFlightBatch, JobContext
from embedq.store.queues import QueueSnapshot

#: Interval between two checks, and the minimum age of a checked batch, seconds.
RECONCILE_EVERY_S, RECONCILE_AFTER_S = 5.0, 10.0


class LostBatchRecovery:
    """Compares the outstanding batches of a job with the state of Redis."""

    def __init__(self, context: JobContext, sender: BatchSender) -> None:
        self._context = context
        self._sender = sender
        self._checked_at = time.monotonic()

    def run_if_due(self) -> None:
        """Publish lost batches again; does nothing within RECONCILE_EVERY_S of the last check.

        Raises:
            QueueUnavailable: Redis is unavailable.
        """
        if time.monotonic() - self._checked_at < RECONCILE_EVERY_S:
            return
        self._checked_at = time.monotonic()
        context, state = self._context, self._context.state
        if not context.redis.call(context.ledger.exists):
            self._restore_job()
            return
        now = time.time()
        old = [
            waiting
            for waiting in state.outstanding.values()
            if now - waiting.published >= RECONCILE_AFTER_S
        ]
        if not old:
            return
        ids = [waiting.task_id for waiting in old]
        snapshot = context.redis.call(lambda: context.broker.snapshot(ids, context.redis.client))
        for waiting in old:
            self._check(waiting, snapshot, now)

    def _check(self, waiting: InFlightBatch, snapshot: QueueSnapshot, now: float) -> None:
        context = self._context
        if not self._is_missing(waiting, snapshot):
            waiting.missing_since = None
            return
        # Every message is missing for a moment, between its queue and its worker.
        waiting.missing_since = waiting.missing_since or now
        if now - waiting.missing_since < RECONCILE_EVERY_S:
            return
        index = waiting.text_batch.index
        if context.redis.call(lambda: context.ledger.has_readable_commit(index)):
            return  # the collector will read its commit
        context.redis.on_wait(f"Batch {index} was lost in Redis; it is published again.")
        self._sender.publish(waiting.text_batch, waiting.recomputes)

    def _is_missing(self, waiting: InFlightBatch, snapshot: QueueSnapshot) -> bool:
        if not snapshot.settled or waiting.task_id in snapshot.unacked:
            return False
        # A queue is first in, first out, so a batch that was published two visibility timeouts
        # before its oldest message is not in it. The margin covers clock differences and requeued
        # messages.
        horizon = waiting.published + 2 * self._context.visibility_timeout_s
        return all(oldest is None or oldest > horizon for oldest in snapshot.oldest.values())

    def _restore_job(self) -> None:
        # The keys of the job were deleted, as by FLUSHALL.
        context = self._context
        context.redis.on_wait(
            "Redis has lost this job; its outstanding batches are published again."
        )
        context.open()
        for waiting in list(context.state.outstanding.values()):
            self._sender.publish(waiting.text_batch, waiting.recomputes)
