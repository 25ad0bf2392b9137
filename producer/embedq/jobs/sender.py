"""Publish within the window, with backpressure.

How much a producer may have in flight. Pure: numbers in, a decision out.

Redis refuses everything once it is full, acknowledgements and deletions included, so a producer
stops long before that, and resumes only when there is room to run for a while.

A producer's look at both Redis before it publishes more.

The pump of a job: publishes its batches up to the window, and those again that were lost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import Final

from redis import Redis

from embedq.errors import BatchTooLarge, QueueFull
from embedq.jobs.batches import TextBatch
from embedq.jobs.state import InFlightBatch, JobContext, PublishedBatch
from embedq.protocol.contract import MAX_BATCHES
from embedq.protocol.message import EmbedBatch
from embedq.store.connection import REPORT_EVERY_S, OnWait
from embedq.store.queues import QueueInspector

#: Share of Redis' memory at which publishing pauses, at which a new job is refused, and below which
#: a paused one resumes.
PAUSE_RATIO: Final = 0.60


REFUSE_RATIO: Final = 0.80


RESUME_RATIO: Final = 0.50


#: Batches per living worker that a job may have in flight, and the bounds of that.
BATCHES_PER_WORKER: Final = 4


MIN_WINDOW: Final = 16


MAX_WINDOW: Final = 256


class PublishMode(StrEnum):
    """Whether a producer may publish."""

    RUN = "run"
    PAUSE = "pause"
    REFUSE = "refuse"


def next_mode(ratio: float, before: PublishMode) -> PublishMode:
    """Decide from the fullest Redis; paused stays paused until there is real room.

    Args:
        ratio: used share of its memory.
        before: the last decision.
    """
    if ratio >= REFUSE_RATIO:
        return PublishMode.REFUSE
    if ratio >= PAUSE_RATIO:
        return PublishMode.PAUSE
    if before is not PublishMode.RUN and ratio >= RESUME_RATIO:
        return PublishMode.PAUSE
    return PublishMode.RUN


def window(live_workers: int, setting: int) -> int:
    """Return how many batches a job may have in flight.

    Small windows are what makes producers share fairly: a big job never has more than this in
    front of a small one.

    Args:
        live_nodes: workers alive.
        setting: fixed by the user; 0 leaves it to the fleet.
    """
    return setting or min(MAX_WINDOW, max(MIN_WINDOW, BATCHES_PER_WORKER * live_workers))


#: Seconds for which a look counts.
FRESH_S: Final = 1.0


#: Seconds after which a refused caller may ask again.
RETRY_AFTER_S: Final = 30.0


class MemoryBackpressure:
    """Open while both Redis have room."""

    def __init__(self, results: Redis, broker: QueueInspector, on_wait: OnWait) -> None:
        self._servers = (broker, QueueInspector(results))
        self._on_wait = on_wait
        self._flow = PublishMode.RUN
        self._ratio = 0.0
        self._looked = self._told = -REPORT_EVERY_S

    def may_publish(self) -> bool:
        """Tell whether there is room for another batch; says so when there is none."""
        self._refresh()
        if self._flow is PublishMode.RUN:
            return True
        if time.monotonic() - self._told >= REPORT_EVERY_S:
            self._told = time.monotonic()
            self._on_wait(
                f"Redis is {self._ratio:.0%} full; publishing pauses until there is room."
            )
        return False

    def check_capacity(self) -> None:
        """Refuse a new job while Redis is nearly full.

        Raises:
            QueueFull: ask again later.
        """
        self._refresh()
        if self._flow is PublishMode.REFUSE:
            raise QueueFull(
                f"Redis is {self._ratio:.0%} full, so it takes no new job. Try again in "
                f"{RETRY_AFTER_S:.0f} s, when running jobs have fetched their vectors, or raise "
                "maxmemory.",
                RETRY_AFTER_S,
            )

    def _refresh(self) -> None:
        if time.monotonic() - self._looked < FRESH_S:
            return
        self._looked = time.monotonic()
        self._ratio = max(server.memory().ratio for server in self._servers)
        self._flow = next_mode(self._ratio, self._flow)


#: Seconds between two notes of how far the job is, for whoever watches it from outside.
PROGRESS_EVERY_S = 1.0


class BatchSender:
    """Pulls batches from the caller, only as fast as the window and both Redis allow."""

    def __init__(
        self,
        context: JobContext,
        slices: Iterator[TextBatch],
        *,
        window: Callable[[], int],
        planned: int | None,
    ) -> None:
        """Prepare; nothing is pulled yet.

        Args:
            context: the job.
            slices, window, planned: as in Job.
        """
        self._context = context
        self._slices = slices
        self._window = window
        self._planned = planned
        self._gate = MemoryBackpressure(context.redis.client, context.broker, context.redis.on_wait)

    def check_capacity(self) -> None:
        """Refuse a new job while Redis is nearly full.

        Raises:
            QueueFull: ask again later.
            QueueUnavailable: Redis stayed away.
        """
        self._context.redis.call(self._gate.check_capacity)

    def fill_window(self) -> None:
        """Publish as many batches as may be out, and note how far the job is.

        Raises:
            BatchTooLarge: the job has too many batches.
            QueueUnavailable: Redis stayed away.
        """
        state = self._context.state
        exhausted = state.exhausted
        self._fill()
        self._report_progress(at_once=state.exhausted and not exhausted)

    def publish(self, piece: TextBatch, recomputes: int = 0) -> None:
        """Publish one batch, or publish it again.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        self._send(self._note(piece, recomputes))

    def _note(self, piece: TextBatch, recomputes: int = 0) -> EmbedBatch:
        """Note that a batch is out before it is: whoever waits again finds it to be missing."""
        context = self._context
        batch = EmbedBatch(context.id, piece.index, piece.texts, context.spec, piece.refused)
        waiting = InFlightBatch(piece, PublishedBatch(batch.task_id, time.time()), recomputes)
        context.state.outstanding[piece.index] = waiting
        return batch

    def _send(self, batch: EmbedBatch) -> None:
        context = self._context
        context.redis.call(lambda: context.publisher.publish(batch, context.queue, context.trace))
        context.state.outstanding[batch.index].sent = PublishedBatch(batch.task_id, time.time())

    def _report_progress(self, *, at_once: bool) -> None:
        """Note how far the job is where operators look."""
        context, state, now = self._context, self._context.state, time.monotonic()
        if not at_once and now - state.last_reported < PROGRESS_EVERY_S:
            return
        state.last_reported = now
        planned = state.sent_texts if state.exhausted else self._planned
        context.redis.call(
            lambda: context.ledger.report_progress(published=state.published, planned=planned)
        )

    def _pull(self) -> EmbedBatch | None:
        """Take the next batch of the caller and count it, or None after the last."""
        state = self._context.state
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
            state.error = error
            raise

    def _fill(self) -> None:
        state, call = self._context.state, self._context.redis.call
        while not state.exhausted:
            ahead = state.in_flight()
            if ahead >= self._window() or not call(self._gate.may_publish):
                return
            batch = self._pull()
            if batch is None:
                state.exhausted = True
                return
            self._send(batch)
