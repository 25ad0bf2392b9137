"""Count what an engine computes, and measure how busy it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(slots=True)
class EngineStats:
    """Counters of one call, or of an engine since it was opened.

    Attributes:
        batches: batches answered with vectors; 0 for one call.
        texts: texts in these batches; 0 for one call.
        tokens: tokens of the texts, special tokens included.
        computed_tokens: tokens with padding and canary: B times T, summed over token batches.
        inferences: token batches computed.
        infer_s: sum of the durations of all inferences, seconds.
        busy_s: time with at least one inference running, seconds.
        wall_s: time since the engine was opened, seconds; 0 for one call.
    """

    batches: int = 0
    texts: int = 0
    tokens: int = 0
    computed_tokens: int = 0
    inferences: int = 0
    infer_s: float = 0.0
    busy_s: float = 0.0
    wall_s: float = 0.0

    @property
    def device_busy_ratio(self) -> float:
        """Return the share of the time in which an inference ran."""
        return min(1.0, self.busy_s / self.wall_s) if self.wall_s > 0 else 0.0

    @property
    def pack_fill_ratio(self) -> float:
        """Return the share of computed tokens that are not padding or canary; 1 if none."""
        return self.tokens / self.computed_tokens if self.computed_tokens else 1.0


class EngineMeter:
    """Measures the inferences of an engine or of one call; may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running = 0
        self._busy_since = 0.0
        self._began = clock()
        self._totals = EngineStats()

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Measure the body as one inference."""
        began = self._clock()
        with self._lock:
            if not self._running:
                self._busy_since = began
            self._running += 1
        try:
            yield
        finally:
            ended = self._clock()
            with self._lock:
                self._running -= 1
                self._totals.infer_s += ended - began
                if not self._running:
                    self._totals.busy_s += ended - self._busy_since

    def add(self, *, texts: int, tokens: int, computed_tokens: int, inferences: int) -> None:
        """Count a batch answered with vectors."""
        with self._lock:
            totals = self._totals
            totals.batches += 1
            totals.texts += texts
            totals.tokens += tokens
            totals.computed_tokens += computed_tokens
            totals.inferences += inferences

    def totals(self) -> EngineStats:
        """Return a copy of the counters; ``busy_s`` includes running inferences."""
        now = self._clock()
        with self._lock:
            busy_s = self._totals.busy_s + (now - self._busy_since if self._running else 0.0)
            return replace(self._totals, busy_s=busy_s, wall_s=now - self._began)
