"""A strict job takes vectors from an NPU or none: it waits while one may come, then gives up."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from redis.exceptions import RedisError

from embedq.contract import Device
from embedq.errors import StrictUnavailable
from embedq.fleet import Heartbeat

#: States of an NPU's node that serve, or may serve soon.
_COMING = ("healthy", "starting", "probing")


def may_serve_strict(node: Heartbeat) -> bool:
    """Tell whether a node computes on an NPU, or is on the way to it."""
    if node.home != Device.NPU:
        # A node that has just begun does not know its device yet.
        return not node.home and node.state == "starting"
    return node.may_return or (node.state in _COMING and node.device != Device.CPU)


class StrictWatch:
    """Gives a job up once no NPU has been there, or on its way, for long enough."""

    def __init__(self, fetch: Callable[[], Sequence[Heartbeat]], wait_s: float) -> None:
        """Watch the fleet for one job.

        Args:
            fetch: returns the living nodes.
            wait_s: how long to go without an NPU.
        """
        self._fetch = fetch
        self._wait_s = wait_s
        self._seen: float | None = None

    def look(self) -> None:
        """Look once.

        Raises:
            StrictUnavailable: there was no NPU for too long; the message says what there was.
        """
        now = time.monotonic()
        try:
            alive = self._fetch()
        except RedisError:  # whoever waits for vectors waits for Redis too, and says so
            self._seen = None
            return
        if self._seen is None or any(map(may_serve_strict, alive)):
            self._seen = now
        elif now - self._seen >= self._wait_s:
            raise StrictUnavailable(
                f"No node with an NPU was there for {self._wait_s:.0f} s (EMBEDQ_NODE_WAIT_S). "
                f"{_why(alive)} Start one with --device npu, or run the job without strict."
            )


def _why(alive: Sequence[Heartbeat]) -> str:
    lost = [node for node in alive if node.home == Device.NPU]
    if lost:
        return " ".join(f"Node {node.node} is {node.state}: {node.reason}" for node in lost)
    return f"{len(alive)} alive, none with an NPU." if alive else "No node is alive."
