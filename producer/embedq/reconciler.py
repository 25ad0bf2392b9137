"""The reconciler of a job: looks for its batches in Redis and publishes again what was lost."""

from __future__ import annotations

import time
from dataclasses import replace

from embedq.errand import Errand
from embedq.job_state import Outstanding
from embedq.pump import Pump
from embedq.reconcile import View, is_lost, is_missing

#: Seconds between two looks for lost batches, and the age at which a batch is looked for.
RECONCILE_EVERY_S, RECONCILE_AFTER_S = 5.0, 10.0


class Reconciler:
    """Compares what a job waits for with what Redis holds; `embedq.reconcile` has the rules."""

    def __init__(self, errand: Errand, pump: Pump) -> None:
        self._errand = errand
        self._pump = pump
        self._looked = time.monotonic()

    def look(self) -> None:
        """Publish again what Redis has lost; every few seconds, and only what is old enough.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        if time.monotonic() - self._looked < RECONCILE_EVERY_S:
            return
        self._looked = time.monotonic()
        link, state = self._errand.link, self._errand.state
        if not self._errand.patiently(self._errand.ledger.exists):
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
        view = self._errand.patiently(lambda: link.broker.look(ids, link.redis))
        for waiting in old:
            self._judge(waiting, view, now)

    def _judge(self, waiting: Outstanding, view: View, now: float) -> None:
        errand = self._errand
        timeout_s = errand.link.visibility_timeout_s
        if not is_missing(waiting.sent, view, visibility_timeout_s=timeout_s):
            waiting.sent = replace(waiting.sent, missed=None)
            return
        if waiting.sent.missed is None:
            waiting.sent = replace(waiting.sent, missed=now)
        if is_lost(waiting.sent, now, patience_s=RECONCILE_EVERY_S):
            index = waiting.slice.index
            if errand.patiently(lambda: errand.ledger.is_coming(index)):
                return  # its commit is on the way to us
            errand.link.on_wait(f"Batch {index} was lost in Redis; it is published again.")
            self._pump.publish(waiting.slice, waiting.recomputes)

    def _begin_again(self) -> None:
        """Bring a job back to life whose keys were deleted under it, as by FLUSHALL."""
        errand = self._errand
        errand.link.on_wait("Redis has forgotten this job; what is outstanding is published again.")
        errand.open()
        for waiting in list(errand.state.outstanding.values()):
            self._pump.publish(waiting.slice, waiting.recomputes)
