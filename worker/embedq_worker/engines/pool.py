"""Who may use which inference request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Final

from embedq_worker.engines.requests import Counters, Slot
from embedq_worker.errors import DeviceLost, InferFailed
from embedq_worker.packing import TokenBatch

#: Requests where a plugin does not say how many it likes, and the most that it gets.
FALLBACK_REQUESTS: Final = 4
MOST_REQUESTS: Final = 8


class Pool:
    """The requests of one shape. A caller that finds none free waits; it never fails for that."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots: Sequence[Slot] = tuple(slots)
        self._free = list(slots)
        self._changed = threading.Condition()
        self._fault: DeviceLost | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def lost(self) -> bool:
        """Say whether a request never came back, so that only a new process helps."""
        return self._fault is not None

    def counters(self) -> Counters:
        """Return what all requests together were asked."""
        return Counters.total([slot.counters for slot in self._slots])

    def warm(self, batch: TokenBatch, deadline_s: float) -> float:
        """Run every request once, for the plugin records its commands at the first; then recount.

        Returns:
            Seconds of the slowest, with all of them in flight as in service.
        """

        def run(slot: Slot) -> float:
            began = time.perf_counter()
            slot.run(batch, deadline_s)
            slot.counters.inferences = 0
            return time.perf_counter() - began

        with ThreadPoolExecutor(len(self._slots)) as callers:
            return max(callers.map(run, self._slots))

    @contextmanager
    def checkout(self) -> Iterator[Slot]:
        """Lend a request, waiting for one; after a lost device nobody gets or waits for one.

        Raises:
            DeviceLost: the device is lost.
            InferFailed: the engine is closed.
        """
        slot = self._take()
        try:
            yield slot
        except DeviceLost as error:
            # It may still be running: it is never lent again.
            with self._changed:
                self._fault = error
                self._changed.notify_all()
            raise
        except BaseException:
            self._give_back(slot)
            raise
        self._give_back(slot)

    def close(self) -> None:
        """Lend no more, and let go of the requests, unless one of them still runs."""
        with self._changed:
            self._closed = True
            if not self._fault:
                self._slots = ()
                self._free.clear()
            self._changed.notify_all()

    def _take(self) -> Slot:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._fault or self._closed)
            if self._fault:
                raise DeviceLost(str(self._fault), self._fault.reason)
            if self._closed:
                raise InferFailed("The openvino engine is closed.")
            return self._free.pop()

    def _give_back(self, slot: Slot) -> None:
        with self._changed:
            if not self._closed:
                self._free.append(slot)
            self._changed.notify()


def request_count(optimal: str, wanted: int) -> int:
    """Decide how many requests to have.

    Args:
        optimal: what the compiled model says, in text; may be nothing.
        wanted: what the settings say, 0 for nothing.
    """
    if wanted:
        return wanted
    count = int(optimal) if optimal.isdigit() else FALLBACK_REQUESTS
    return min(max(count, 1), MOST_REQUESTS)
