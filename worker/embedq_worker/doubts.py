"""Signs that a device or a process cannot be trusted, weighed before anything is done about them.

Pure: the clock is passed in.
"""

from __future__ import annotations

import statistics
from collections import deque

from embedq_worker.errors import Reason
from embedq_worker.state import NodeState, State

#: Failures that a sound device may have once in a while: a text that it cannot take, a moment
#: without memory. Every other reason ends the trust at once.
FORGIVABLE = frozenset(
    {Reason.INFER_FAILED, Reason.DEVICE_ERROR, Reason.OUT_OF_MEMORY, Reason.ENGINE_FAILED}
)
#: Batches from which a node learns how fast its device is.
LEARN_FROM = 8


class Failures:
    """Failed batches of a device; some are forgiven, until there are too many."""

    def __init__(self, allowed: int, window_s: float) -> None:
        """Forgive fewer than ``allowed`` failures within ``window_s`` seconds."""
        self._allowed = allowed
        self._window_s = window_s
        self._recent: list[float] = []

    def are_too_many(self, reason: Reason, now_s: float) -> bool:
        """Count a failure, and tell whether the device has lost its trust."""
        self._recent = [at for at in self._recent if now_s - at < self._window_s] + [now_s]
        return reason not in FORGIVABLE or len(self._recent) >= self._allowed


class Pace:
    """How fast a device is against how fast it was when it began."""

    def __init__(self, factor: float, batches: int, known_s: float = 0.0) -> None:
        """Call a device slow after ``batches`` in a row that took ``factor`` times as long.

        Args:
            factor: 0 never calls it slow.
            batches: in a row.
            known_s: what an inference took before, so that a device that comes back slow is found
                as well; 0 learns it from the first batches.
        """
        self._factor = factor
        self._batches = batches
        self._first: list[float] = []
        self.known_s = known_s
        self._row: deque[float] = deque(maxlen=batches)

    def is_slow(self, seconds: float) -> bool:
        """Take note of one batch, and tell whether the device has become slow.

        Args:
            seconds: for each inference of the batch.
        """
        if not self._factor:
            return False
        if not self.known_s:
            self._first.append(seconds)
            if len(self._first) == LEARN_FROM:
                self.known_s = statistics.median(self._first)
            return False
        self._row.append(seconds)
        return len(self._row) == self._batches and min(self._row) > self._factor * self.known_s


class Deaths:
    """Children that died; Celery replaces them without end."""

    def __init__(self, allowed: int, window_s: float) -> None:
        """Call ``allowed`` deaths within ``window_s`` seconds a loop."""
        self._allowed = allowed
        self._window_s = window_s
        self._last: NodeState | None = None
        self._all: list[float] = []
        self._early = 0

    def note(self, child: NodeState | None, now_s: float, *, ended: int = 0) -> None:
        """Look at the child once more.

        Args:
            child: what it says; looks may miss a child, which only makes this slower.
            now_s: seconds on a clock that never goes back.
            ended: process id of the child that this node ended itself, which does not count.
        """
        last, self._last = self._last, child
        if child is not None and child.state is not State.STARTING:
            self._early = 0
        if last is None or child is None or child.pid in (0, last.pid) or last.pid in (0, ended):
            return
        self._all = [at for at in self._all if now_s - at < self._window_s] + [now_s]
        if child.state is State.STARTING and last.state is State.STARTING:
            self._early += 1

    @property
    def is_loop(self) -> bool:
        """Whether children die again and again, whatever they were at."""
        return len(self._all) >= self._allowed

    @property
    def is_early_loop(self) -> bool:
        """Whether children die before they are ready, one after the other, however slowly."""
        return self._early >= self._allowed

    def forget(self) -> None:
        """Begin again: the next children run on another device."""
        self._all, self._early = [], 0
