"""Publishes the batches of a job within its window and while Redis has memory.

A full Redis refuses every command, acknowledgements and deletions included, so a producer pauses
long before that and resumes with a margin.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

from redis import Redis

from embedq.errors import BatchTooLarge, QueueFull
from embedq.jobs.batches import TextBatch
from embedq.jobs.state import InFlightBatch, JobContext
from embedq.protocol.contract import MAX_BATCHES
from embedq.protocol.message import EmbedBatch
from embedq.store.connection import REPORT_EVERY_S, OnWait
from embedq.store.queues import QueueInspector

#: Used share of Redis memory at which publishing pauses.
PAUSE_RATIO: Final = 0.60

#: Used share of Redis memory at which a new job is refused.
REFUSE_RATIO: Final = 0.80

#: Used share of Redis memory below which paused publishing resumes.
RESUME_RATIO: Final = 0.50

#: Batches of a job in flight per living worker.
BATCHES_PER_WORKER: Final = 4

#: Minimum and maximum of the computed window, batches.
MIN_WINDOW: Final = 16
MAX_WINDOW: Final = 256


def window(live_workers: int, setting: int) -> int:
    """Return how many batches a job may have in flight.

    Small windows share the fleet fairly: a small job waits for at most one window of a large one.

    Args:
        live_workers: living workers.
        setting: `max_in_flight`; 0 computes the window from the number of workers.
    """
    return setting or min(MAX_WINDOW, max(MIN_WINDOW, BATCHES_PER_WORKER * live_workers))


#: Time for which a reading of the memory use is reused, seconds.
FRESH_S: Final = 1.0

#: Time after which a refused caller should try again, seconds.
RETRY_AFTER_S: Final = 30.0


class MemoryBackpressure:
    """Allows publishing while both Redis have memory."""

    def __init__(self, results: Redis, broker: QueueInspector, on_wait: OnWait) -> None:
        self._servers = (broker, QueueInspector(results))
        self._on_wait = on_wait
        self._is_paused = False
        self._ratio = 0.0
        self._read_at = self._reported_at = -REPORT_EVERY_S

    def may_publish(self) -> bool:
        """Return whether there is memory for another batch; reports a pause to `on_wait`."""
        self._refresh()
        if self._is_paused and time.monotonic() - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = time.monotonic()
            self._on_wait(
                f"Redis is {self._ratio:.0%} full; publishing pauses until there is room."
            )
        return not self._is_paused

    def check_capacity(self) -> None:
        """Refuse a new job while Redis is nearly full.

        Raises:
            QueueFull: try again later.
        """
        self._refresh()
        if self._ratio >= REFUSE_RATIO:
            raise QueueFull(
                f"Redis is {self._ratio:.0%} full, so it accepts no new job. Try again in "
                f"{RETRY_AFTER_S:.0f} s, when running jobs have fetched their vectors, or raise "
                "maxmemory.",
                RETRY_AFTER_S,
            )

    def _refresh(self) -> None:
        if time.monotonic() - self._read_at < FRESH_S:
            return
        self._ratio = max(server.memory().ratio for server in self._servers)
        self._read_at = time.monotonic()
        self._is_paused = self._ratio >= (RESUME_RATIO if self._is_paused else PAUSE_RATIO)


#: Interval between two progress reports for operators, seconds.
PROGRESS_EVERY_S = 1.0


class BatchSender:
    """Pulls batches from the caller as fast as the window and both Redis allow."""

    def __init__(
        self,
        context: JobContext,
        text_batches: Iterator[TextBatch],
        *,
        window: Callable[[], int],
        planned: int | None,
    ) -> None:
        self._context = context
        self._text_batches = text_batches
        self._window = window
        self._planned = planned
        self._backpressure = MemoryBackpressure(
            context.redis.client, context.broker, context.redis.on_wait
        )

    def check_capacity(self) -> None:
        """Refuse a new job while Redis is nearly full; see MemoryBackpressure.check_capacity."""
        self._context.redis.call(self._backpressure.check_capacity)

    def fill_window(self) -> None:
        """Publish batches until the window is full, and report the progress.

        Raises:
            BatchTooLarge: the job has too many batches.
            QueueUnavailable: Redis is unavailable.
        """
        state, call = self._context.state, self._context.redis.call
        exhausted = state.exhausted
        while (
            not state.exhausted
            and state.in_flight() < self._window()
            and call(self._backpressure.may_publish)
        ):
            batch = self._pull()
            if batch is not None:
                self._send(batch)
        self._report_progress(at_once=state.exhausted and not exhausted)

    def publish(self, text_batch: TextBatch, recomputes: int = 0) -> None:
        """Publish one batch, or publish it again.

        Raises:
            QueueUnavailable: Redis is unavailable.
        """
        self._send(self._note(text_batch, recomputes))

    def _note(self, text_batch: TextBatch, recomputes: int = 0) -> EmbedBatch:
        # Noted before it is published: after a failed publish, recovery finds it to be missing.
        context = self._context
        batch = EmbedBatch(
            context.id, text_batch.index, text_batch.texts, context.spec, text_batch.refused
        )
        waiting = InFlightBatch(text_batch, batch.task_id, time.time(), recomputes)
        context.state.outstanding[text_batch.index] = waiting
        return batch

    def _send(self, batch: EmbedBatch) -> None:
        context = self._context
        context.redis.call(lambda: context.publisher.publish(batch, context.queue, context.trace))
        context.state.outstanding[batch.index].published = time.time()

    def _report_progress(self, *, at_once: bool) -> None:
        context, state, now = self._context, self._context.state, time.monotonic()
        if not at_once and now - state.last_reported < PROGRESS_EVERY_S:
            return
        state.last_reported = now
        planned = state.sent_texts if state.exhausted else self._planned
        context.redis.call(
            lambda: context.ledger.report_progress(published=state.published, planned=planned)
        )

    def _pull(self) -> EmbedBatch | None:
        state = self._context.state
        try:
            text_batch = next(self._text_batches, None)
            if text_batch is None:
                state.exhausted = True
                return None
            if text_batch.index >= MAX_BATCHES:
                raise BatchTooLarge(
                    f"The job has more than {MAX_BATCHES:,} batches. "
                    "Split the input into several jobs."
                )
            if not state.published:
                state.first = text_batch.index
            state.published += 1
            state.sent_texts += len(text_batch)
            return self._note(text_batch)
        except BaseException as error:  # includes Ctrl-C
            # The next call of next() would report the end of the generator, not its error.
            state.error = error
            raise
