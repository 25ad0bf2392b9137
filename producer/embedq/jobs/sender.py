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
from embedq.jobs.batches import Slice
from embedq.jobs.state import Errand, Outstanding, Sent
from embedq.observability import status
from embedq.protocol.contract import MAX_BATCHES
from embedq.protocol.message import EmbedBatch
from embedq.store.connection import REPORT_EVERY_S, OnWait
from embedq.store.queues import Broker

#: Share of Redis' memory at which publishing pauses, at which a new job is refused, and below which
#: a paused one resumes.
PAUSE_RATIO: Final = 0.60


REFUSE_RATIO: Final = 0.80


RESUME_RATIO: Final = 0.50


#: Batches per living node that a job may have in flight, and the bounds of that.
BATCHES_PER_NODE: Final = 4


MIN_WINDOW: Final = 16


MAX_WINDOW: Final = 256


class Flow(StrEnum):
    """Whether a producer may publish."""

    RUN = "run"
    PAUSE = "pause"
    REFUSE = "refuse"


def flow(ratio: float, before: Flow) -> Flow:
    """Decide from the fullest Redis; paused stays paused until there is real room.

    Args:
        ratio: used share of its memory.
        before: the last decision.
    """
    if ratio >= REFUSE_RATIO:
        return Flow.REFUSE
    if ratio >= PAUSE_RATIO:
        return Flow.PAUSE
    if before is not Flow.RUN and ratio >= RESUME_RATIO:
        return Flow.PAUSE
    return Flow.RUN


def window(live_nodes: int, setting: int) -> int:
    """Return how many batches a job may have in flight.

    Small windows are what makes producers share fairly: a big job never has more than this in
    front of a small one.

    Args:
        live_nodes: nodes alive.
        setting: fixed by the user; 0 leaves it to the fleet.
    """
    return setting or min(MAX_WINDOW, max(MIN_WINDOW, BATCHES_PER_NODE * live_nodes))


#: Seconds for which a look counts.
FRESH_S: Final = 1.0


#: Seconds after which a refused caller may ask again.
RETRY_AFTER_S: Final = 30.0


class Gate:
    """Open while both Redis have room."""

    def __init__(self, results: Redis, broker: Broker, on_wait: OnWait) -> None:
        self._servers = (broker, Broker(results))
        self._on_wait = on_wait
        self._flow = Flow.RUN
        self._ratio = 0.0
        self._looked = self._told = -REPORT_EVERY_S

    def may_publish(self) -> bool:
        """Tell whether there is room for another batch; says so when there is none."""
        self._look()
        if self._flow is Flow.RUN:
            return True
        if time.monotonic() - self._told >= REPORT_EVERY_S:
            self._told = time.monotonic()
            self._on_wait(
                f"Redis is {self._ratio:.0%} full; publishing pauses until there is room."
            )
        return False

    def require_room(self) -> None:
        """Refuse a new job while Redis is nearly full.

        Raises:
            QueueFull: ask again later.
        """
        self._look()
        if self._flow is Flow.REFUSE:
            raise QueueFull(
                f"Redis is {self._ratio:.0%} full, so it takes no new job. Try again in "
                f"{RETRY_AFTER_S:.0f} s, when running jobs have fetched their vectors, or raise "
                "maxmemory.",
                RETRY_AFTER_S,
            )

    def _look(self) -> None:
        if time.monotonic() - self._looked < FRESH_S:
            return
        self._looked = time.monotonic()
        self._ratio = max(server.load().ratio for server in self._servers)
        self._flow = flow(self._ratio, self._flow)


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
            lambda: status.tell(
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
