"""Counters of an engine.

What was computed, for one batch or since an engine was opened, and how busy the engine was.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass(slots=True)
class EngineStats:
    """What was computed, of one call or since an engine was opened.

    Attributes:
        batches: tasks answered with vectors; not counted for one call.
        texts: texts in them; the same.
        tokens: tokens of the texts, special tokens included.
        computed_tokens: the same with padding and canary, B times T of every token batch.
        inferences: token batches computed.
        infer_s: seconds of all inferences added up; several at once count several times.
        busy_s: seconds with at least one of these inferences under way.
        wall_s: seconds since the engine was opened; 0 for one call.
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
        """Return the share of the time in which the engine had something to do."""
        return min(1.0, self.busy_s / self.wall_s) if self.wall_s > 0 else 0.0

    @property
    def pack_fill_ratio(self) -> float:
        """Return the share of what was computed that was text; 1 if nothing was."""
        return self.tokens / self.computed_tokens if self.computed_tokens else 1.0


class EngineMeter:
    """Measures the inferences of an engine, or of one call of it; any thread may call it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = 0
        self._busy_since = 0.0
        self._began = clock()
        self._totals = EngineStats()

    @contextmanager
    def inferring(self) -> Iterator[None]:
        """Count the body as an inference under way."""
        began = self._clock()
        with self._lock:
            if not self._under_way:
                self._busy_since = began
            self._under_way += 1
        try:
            yield
        finally:
            ended = self._clock()
            with self._lock:
                self._under_way -= 1
                self._totals.infer_s += ended - began
                if not self._under_way:
                    self._totals.busy_s += ended - self._busy_since

    def add(self, *, texts: int, tokens: int, computed_tokens: int, inferences: int) -> None:
        """Count a batch that was answered."""
        with self._lock:
            totals = self._totals
            totals.batches += 1
            totals.texts += texts
            totals.tokens += tokens
            totals.computed_tokens += computed_tokens
            totals.inferences += inferences

    def totals(self) -> EngineStats:
        """Return a copy of the numbers, the inferences under way included in ``busy_s``."""
        now = self._clock()
        with self._lock:
            busy_s = self._totals.busy_s + (now - self._busy_since if self._under_way else 0.0)
            return replace(self._totals, busy_s=busy_s, wall_s=now - self._began)
