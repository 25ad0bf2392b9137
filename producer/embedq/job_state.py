"""The state of a running job: what is out, what is back, what was handed on. Asks Redis nothing."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from embedq.batching import Slice
from embedq.finished import FinishedBatch
from embedq.outcomes import TRUNCATED
from embedq.reconcile import Sent


@dataclass(frozen=True, slots=True)
class JobProgress:
    """How far a job is.

    Attributes:
        published: batches sent so far.
        texts: texts handed out, with their failed and truncated ones.
        failed, truncated: how many of these.
        finished: nothing more will come.
    """

    published: int
    texts: int
    failed: int
    truncated: int
    finished: bool


@dataclass(slots=True)
class Outstanding:
    """A batch that was published and has not come back.

    Attributes:
        slice: the texts.
        sent: its message.
        recomputes: times its vectors were lost or damaged.
    """

    slice: Slice
    sent: Sent
    recomputes: int = 0


@dataclass(slots=True)
class JobState:
    """What a running job remembers; bounded by its window.

    Attributes:
        ordered: batches are handed out in their order, not as they complete.
        outstanding: index -> batch that has no vectors yet.
        ready: index -> batch that was not handed out yet.
        published, sent_texts: batches and texts sent so far.
        told: time.monotonic() of the last note for operators.
        yielded: batches handed out.
        first: index of the first batch.
        texts, failed, truncated: texts handed out, and how many of them are these.
        open, closed: the job has begun, has ended.
        kept_alive: time.monotonic() of the last sign of life.
        until: time.monotonic() until which the caller waits.
        exhausted: there are no more batches to publish.
        broken_by: what ended the job before its time.
    """

    ordered: bool
    outstanding: dict[int, Outstanding] = field(default_factory=dict)
    ready: dict[int, FinishedBatch] = field(default_factory=dict)
    published: int = 0
    sent_texts: int = 0
    told: float = 0.0
    yielded: int = 0
    first: int = 0
    texts: int = 0
    failed: int = 0
    truncated: int = 0
    open: bool = False
    closed: bool = False
    kept_alive: float = field(default_factory=time.monotonic)
    until: float = math.inf
    exhausted: bool = False
    broken_by: BaseException | None = None

    def count_ahead(self) -> int:
        """Return how many batches the window holds."""
        return self.published - self.yielded if self.ordered else len(self.outstanding)

    def is_done(self) -> bool:
        """Tell whether every batch was published and came back."""
        return self.exhausted and not self.outstanding

    def hand_out(self) -> FinishedBatch | None:
        """Take the next batch that is ready, or None."""
        if not self.ready:
            return None
        index = self.first + self.yielded if self.ordered else next(iter(self.ready))
        if index not in self.ready:
            return None
        finished = self.ready[index]
        self._count(finished, 1)
        del self.ready[index]
        return finished

    def take_back(self, finished: FinishedBatch) -> None:
        """Undo the last hand-out: it did not reach the caller."""
        self.ready[finished.slice.index] = finished
        self._count(finished, -1)

    def progress(self) -> JobProgress:
        """Return how far the job is."""
        return JobProgress(
            published=self.published,
            texts=self.texts,
            failed=self.failed,
            truncated=self.truncated,
            finished=self.closed,
        )

    def _count(self, finished: FinishedBatch, sign: int) -> None:
        failed = finished.outcomes.count_failed()
        truncated = finished.outcomes.count_flag(TRUNCATED)
        # All of it after what takes time: Ctrl-C comes before it, or as good as never.
        self.texts += sign * len(finished.slice)
        self.failed += sign * failed
        self.truncated += sign * truncated
        self.yielded += sign
