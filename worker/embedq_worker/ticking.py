"""Work that a node's parent does again and again beside passing batches on."""

from __future__ import annotations

from typing import Any

from celery import bootsteps


class Ticking(bootsteps.StartStopStep):
    """A step on the event loop's own timer: ticks while the node hears its broker.

    It starts once the queues can be consumed, and again after each reconnect.

    Attributes:
        every_s: seconds between two ticks.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    every_s: float

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._timer: Any = None

    def start(self, c: Any) -> None:
        """Tick from now on."""
        self._timer = c.timer.call_repeatedly(self.every_s, self.tick, (c,))

    def stop(self, c: Any) -> None:
        """Stop; runs whenever the broker is lost, and at the end."""
        if self._timer is not None:
            self._timer.cancel()

    def tick(self, c: Any) -> None:
        """Do it once; kombu logs what this raises, and the next tick comes all the same."""
        raise NotImplementedError
