"""The step in a node's parent that keeps the batches in hand its own."""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.worker import state as worker_state
from redis.exceptions import RedisError

from embedq_worker.settings import WorkerSettings
from embedq_worker.ticking import Ticking

log = logging.getLogger("embedq.worker")


class RenewLeases(Ticking):
    """Keep the batches in hand ours for as long as this parent lives.

    Kombu gives a message to another node once it has been unacknowledged for the visibility
    timeout, however busy its owner is: without renewal a batch of three timeouts ran three times
    (measured). With it the timeout can be a minute, so a dead node's batch restarts soon.
    """

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self.every_s = min(settings.lease_renewal_s, settings.visibility_timeout_s / 4)

    def tick(self, c: Any) -> None:
        """Renew every lease."""
        held = {
            request.message.delivery_tag: time.time()
            for request in worker_state.reserved_requests | worker_state.active_requests
            if not request.acknowledged and request.message.delivery_tag
        }
        if not held:
            return
        channel = c.task_consumer.channel
        try:
            with channel.conn_or_acquire() as client:
                # XX: a message acknowledged in this very moment must not come back to life.
                client.zadd(channel.unacked_index_key, held, xx=True)
        except (RedisError, OSError) as error:
            log.warning("lease_not_renewed held=%d reason=%s", len(held), type(error).__name__)
