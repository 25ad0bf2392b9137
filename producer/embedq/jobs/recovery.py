"""Finds lost batches of a job and publishes them again.

Redis removes a message from its queue before the worker can store it as unacknowledged; if the
worker dies in between, the message is lost. Publishing a batch twice is safe, because the ledger
accepts the first commit only. The rules here avoid it for batches that still wait in a queue.
"""

from __future__ import annotations

import time
from dataclasses import replace

from embedq.jobs.sender import BatchSender
from embedq.jobs.state import InFlightBatch, JobContext, PublishedBatch
from embedq.store.queues import QueueSnapshot


def is_missing(
    sent: PublishedBatch, snapshot: QueueSnapshot, *, visibility_timeout_s: float
) -> bool:
    """Return whether a batch is neither unacknowledged nor waiting in a queue.

    A queue is first in, first out, so a batch that was published two visibility timeouts before
    its oldest message is not in it. The margin covers clock differences and requeued messages.
    """
    if not snapshot.settled or sent.task_id in snapshot.unacked:
        return False
    horizon = sent.published + 2 * visibility_timeout_s
    return all(oldest is None or oldest > horizon for oldest in snapshot.oldest.values())


def is_lost(sent: PublishedBatch, now: float, *, grace_s: float) -> bool:
    """Return whether a batch has been missing for `grace_s`.

    Every message is missing for a moment, between its queue and its worker.
    """
    return sent.missing_since is not None and now - sent.missing_since >= grace_s


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
            if now - waiting.sent.published >= RECONCILE_AFTER_S
        ]
        if not old:
            return
        ids = [waiting.sent.task_id for waiting in old]
        snapshot = context.redis.call(lambda: context.broker.snapshot(ids, context.redis.client))
        for waiting in old:
            self._check(waiting, snapshot, now)

    def _check(self, waiting: InFlightBatch, snapshot: QueueSnapshot, now: float) -> None:
        context = self._context
        timeout_s = context.visibility_timeout_s
        if not is_missing(waiting.sent, snapshot, visibility_timeout_s=timeout_s):
            waiting.sent = replace(waiting.sent, missing_since=None)
            return
        if waiting.sent.missing_since is None:
            waiting.sent = replace(waiting.sent, missing_since=now)
        if is_lost(waiting.sent, now, grace_s=RECONCILE_EVERY_S):
            index = waiting.slice.index
            if context.redis.call(lambda: context.ledger.has_readable_commit(index)):
                return  # the collector will read its commit
            context.redis.on_wait(f"Batch {index} was lost in Redis; it is published again.")
            self._sender.publish(waiting.slice, waiting.recomputes)

    def _restore_job(self) -> None:
        # The keys of the job were deleted, as by FLUSHALL.
        context = self._context
        context.redis.on_wait(
            "Redis has lost this job; its outstanding batches are published again."
        )
        context.open()
        for waiting in list(context.state.outstanding.values()):
            self._sender.publish(waiting.slice, waiting.recomputes)
