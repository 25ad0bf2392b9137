"""The step in a node's parent that hears what an operator wants of it."""

from __future__ import annotations

import logging
import time
from typing import Any

from redis.exceptions import RedisError

from embedq.orders import Order, Wanted, fetch_orders
from embedq.redis_client import open_redis
from embedq_worker.guard import Guard
from embedq_worker.settings import WorkerSettings
from embedq_worker.ticking import Ticking

log = logging.getLogger("embedq.worker")

#: Seconds between two questions, and after one that Redis did not answer.
ASK_EVERY_S, REST_S = 0.3, 5.0
#: Seconds that a question may hold up the event loop when Redis does not answer.
TIMEOUT_S = 0.5


class HearOperator(Ticking):
    """Ask the results Redis for standing orders.

    They lie there and not in a message, so that they last over a restart of the node and of Celery
    until somebody undoes them. While Redis is away, the last that was heard holds.
    """

    every_s = ASK_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._node = settings.name
        self._last: Order | None = None
        self._has_heard = False
        self._began = time.time()
        self._rests_until = 0.0
        self._redis = open_redis(
            settings.results_url, connect_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S
        )

    def start(self, c: Any) -> None:
        """Ask before the first batch, and from now on."""
        self.tick(c)
        super().start(c)

    def tick(self, c: Any) -> None:
        """Ask once, unless Redis did not answer just now."""
        now_s = time.monotonic()
        if now_s < self._rests_until:
            return
        try:
            order, paused = fetch_orders(self._redis, self._node)
        except RedisError as error:
            log.debug("orders_not_heard reason=%s", type(error).__name__)
            self._rests_until = now_s + REST_S
            return
        guard: Guard = c.app.conf.embedq_guard
        if guard.paused != paused:
            log.warning("%s node=%s", "paused" if paused else "resumed", self._node)
            guard.paused = paused
        first, self._has_heard = not self._has_heard, True
        if order == self._last:
            return
        self._last = order
        if order is not None and order.wanted is Wanted.DEGRADED:
            guard.hold(order.reason, time.time())
        # What stood there before the node began was for a fault of before. Later ones count,
        # whatever their time: the operator's clock may be behind.
        elif not first or order is None or order.at >= self._began:
            guard.release(time.time())
