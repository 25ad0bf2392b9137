"""Find lost batches and publish them again.

Which batches are lost, decided from what Redis holds. Pure: the clock and the view come in.

Redis hands a message to a worker before the worker can note that it has it; a worker that dies in
between takes the message with it, and nothing in Redis says so. Such a batch is outstanding and
nowhere to be found. Publishing it again is always safe, because the ledger takes the first commit
only; the rules here keep it from being done for a batch that only waits its turn.

The reconciler of a job: looks for its batches in Redis and publishes again what was lost.
"""

from __future__ import annotations

import time
from dataclasses import replace

from embedq.jobs.sender import BatchSender
from embedq.jobs.state import InFlightBatch, JobContext, PublishedBatch
from embedq.store.queues import QueueSnapshot


def is_missing(sent: PublishedBatch, view: QueueSnapshot, *, visibility_timeout_s: float) -> bool:
    """Tell whether a batch is neither in a worker's hand nor can be waiting in a queue.

    A queue is first in, first out, so a batch that was published long before the oldest message of
    a queue is not in it. "Long" covers clocks that differ and messages put back at the front.
    """
    if not view.settled or sent.task_id in view.unacked:
        return False
    horizon = sent.published + 2 * visibility_timeout_s
    return all(oldest is None or oldest > horizon for oldest in view.oldest.values())


def is_lost(sent: PublishedBatch, now: float, *, retry_timeout_s: float) -> bool:
    """Tell whether a missing batch has been missing for long enough.

    For a moment every message is in nobody's hand, on its way from the queue to a worker.
    """
    return sent.missing_since is not None and now - sent.missing_since >= retry_timeout_s


#: Seconds between two looks for lost batches, and the age at which a batch is looked for.
RECONCILE_EVERY_S, RECONCILE_AFTER_S = 5.0, 10.0


class LostBatchRecovery:
    """Compares what a job waits for with what Redis holds; `embedq.jobs.recovery` has the rules."""

    def __init__(self, context: JobContext, pump: BatchSender) -> None:
        self._context = context
        self._pump = pump
        self._looked = time.monotonic()

    def run_if_due(self) -> None:
        """Publish again what Redis has lost; every few seconds, and only what is old enough.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        if time.monotonic() - self._looked < RECONCILE_EVERY_S:
            return
        self._looked = time.monotonic()
        context, state = self._context, self._context.state
        if not self._context.redis.call(self._context.ledger.exists):
            self._begin_again()
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
        view = context.redis.call(lambda: context.broker.snapshot(ids, context.redis.client))
        for waiting in old:
            self._judge(waiting, view, now)

    def _judge(self, waiting: InFlightBatch, view: QueueSnapshot, now: float) -> None:
        context = self._context
        timeout_s = context.visibility_timeout_s
        if not is_missing(waiting.sent, view, visibility_timeout_s=timeout_s):
            waiting.sent = replace(waiting.sent, missing_since=None)
            return
        if waiting.sent.missing_since is None:
            waiting.sent = replace(waiting.sent, missing_since=now)
        if is_lost(waiting.sent, now, retry_timeout_s=RECONCILE_EVERY_S):
            index = waiting.slice.index
            if context.redis.call(lambda: context.ledger.has_readable_commit(index)):
                return  # its commit is on the way to us
            context.redis.on_wait(f"Batch {index} was lost in Redis; it is published again.")
            self._pump.publish(waiting.slice, waiting.recomputes)

    def _begin_again(self) -> None:
        """Bring a job back to life whose keys were deleted under it, as by FLUSHALL."""
        context = self._context
        context.redis.on_wait(
            "Redis has forgotten this job; what is outstanding is published again."
        )
        context.open()
        for waiting in list(context.state.outstanding.values()):
            self._pump.publish(waiting.slice, waiting.recomputes)
