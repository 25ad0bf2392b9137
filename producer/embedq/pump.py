"""The pump of a job: publishes its batches up to the window, and those again that were lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from embedq import progress
from embedq.batching import Slice
from embedq.contract import MAX_BATCHES
from embedq.errand import Errand
from embedq.errors import BatchTooLarge
from embedq.gate import Gate
from embedq.job_state import Outstanding
from embedq.message import EmbedBatch
from embedq.reconcile import Sent

#: Seconds between two notes of how far the job is, for whoever watches it from outside.
TELL_EVERY_S = 1.0


class Pump:
    """Pulls batches from the caller, only as fast as the window and both Redis allow."""

    def __init__(
        self,
        errand: Errand,
        slices: Iterator[Slice],
        *,
        window: Callable[[], int],
        planned: int | None,
    ) -> None:
        """Prepare; nothing is pulled yet.

        Args:
            errand: the job.
            slices, window, planned: as in Job.
        """
        self._errand = errand
        self._slices = slices
        self._window = window
        self._planned = planned
        link = errand.link
        self._gate = Gate(link.redis, link.broker, link.on_wait)

    def require_room(self) -> None:
        """Refuse a new job while Redis is nearly full.

        Raises:
            QueueFull: ask again later.
            QueueUnavailable: Redis stayed away.
        """
        self._errand.patiently(self._gate.require_room)

    def publish_up_to_window(self) -> None:
        """Publish as many batches as may be out, and note how far the job is.

        Raises:
            BatchTooLarge: the job has too many batches.
            QueueUnavailable: Redis stayed away.
        """
        state = self._errand.state
        exhausted = state.exhausted
        self._fill_window()
        self._tell(at_once=state.exhausted and not exhausted)

    def publish(self, piece: Slice, recomputes: int = 0) -> None:
        """Publish one batch, or publish it again.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        self._send(self._note(piece, recomputes))

    def _note(self, piece: Slice, recomputes: int = 0) -> EmbedBatch:
        """Note that a batch is out before it is: whoever waits again finds it to be missing."""
        errand = self._errand
        batch = EmbedBatch(errand.id, piece.index, piece.texts, errand.spec, piece.refused)
        waiting = Outstanding(piece, Sent(batch.task_id, time.time()), recomputes)
        errand.state.outstanding[piece.index] = waiting
        return batch

    def _send(self, batch: EmbedBatch) -> None:
        errand = self._errand
        errand.patiently(lambda: errand.link.publisher.publish(batch, errand.queue, errand.trace))
        errand.state.outstanding[batch.index].sent = Sent(batch.task_id, time.time())

    def _tell(self, *, at_once: bool) -> None:
        """Note how far the job is where operators look."""
        errand, state, now = self._errand, self._errand.state, time.monotonic()
        if not at_once and now - state.told < TELL_EVERY_S:
            return
        state.told = now
        planned = state.sent_texts if state.exhausted else self._planned
        errand.patiently(
            lambda: progress.tell(
                errand.link.redis, errand.id, published=state.published, planned=planned
            )
        )

    def _pull(self) -> EmbedBatch | None:
        """Take the next batch of the caller and count it, or None after the last."""
        state = self._errand.state
        try:
            piece = next(self._slices, None)
            if piece is None:
                return None
            if piece.index >= MAX_BATCHES:
                raise BatchTooLarge(
                    f"The job has more than {MAX_BATCHES:,} batches. Split the input into jobs."
                )
            if not state.published:
                state.first = piece.index
            state.published += 1
            state.sent_texts += len(piece)
            return self._note(piece)
        except BaseException as error:  # Ctrl-C, too
            # A generator that has raised seems to be at its end to whoever asks again.
            state.broken_by = error
            raise

    def _fill_window(self) -> None:
        state, patiently = self._errand.state, self._errand.patiently
        while not state.exhausted:
            ahead = state.count_ahead()
            if ahead >= self._window() or not patiently(self._gate.may_publish):
                return
            batch = self._pull()
            if batch is None:
                state.exhausted = True
                return
            self._send(batch)
