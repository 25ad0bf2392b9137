"""A producer's look at both Redis before it publishes more."""

from __future__ import annotations

import time
from typing import Final

from redis import Redis

from embedq.backpressure import Flow, flow
from embedq.broker import Broker
from embedq.errors import QueueFull
from embedq.patience import REPORT_EVERY_S, OnWait

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
