"""The link of a job to both Redis, patient while one of them is away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from redis import Redis

from embedq.broker import Broker
from embedq.patience import OnWait, patiently
from embedq.publisher import Publisher

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Link:
    """What a job talks through.

    Attributes:
        redis: of the results.
        broker: the queues, looked at from outside Celery.
        publisher: of the broker.
        where: addresses of both, without passwords.
        patience_s: how long to wait for a Redis that went away.
        visibility_timeout_s: the fleet's lease on a batch.
        on_wait: told what is waited for.
        on_idle: called about every second while nothing arrives; may raise to end the job.
    """

    redis: Redis
    broker: Broker
    publisher: Publisher
    where: str
    patience_s: float
    visibility_timeout_s: float
    on_wait: OnWait
    on_idle: Callable[[], None]

    def patiently(self, action: Callable[[], T], patience_s: float | None = None) -> T:
        """Run an action on Redis, and again while it is worth waiting.

        Args:
            action: must be safe to repeat.
            patience_s: how long to wait; None for as long as usual.

        Raises:
            QueueUnavailable: patience ran out, or waiting cannot help.
        """
        if patience_s is None:
            patience_s = self.patience_s
        return patiently(action, patience_s=patience_s, on_wait=self.on_wait, where=self.where)
