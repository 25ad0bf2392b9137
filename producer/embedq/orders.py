"""What an operator wants of the fleet: orders in Redis, which stand until they are undone."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Final, NamedTuple

import msgpack
from redis import Redis

from embedq.records import plain

#: Hash: node -> its last order.
ORDERS_KEY: Final = "embedq:orders"
#: Exists while an operator has paused the fleet; holds why and since when.
PAUSED_KEY: Final = "embedq:paused"


class Wanted(StrEnum):
    """What may be wanted of a node."""

    DEGRADED = "degraded"
    HEALTHY = "healthy"


class Order(NamedTuple):
    """One order.

    Attributes:
        wanted: of the node.
        reason: why; a person's words.
        at: Unix time at which it was given, in seconds.
    """

    wanted: Wanted
    reason: str
    at: float


class Pause(NamedTuple):
    """A pause of the whole fleet.

    Attributes:
        reason: why; a person's words.
        at: Unix time at which it began, in seconds.
    """

    reason: str
    at: float


def give(redis: Redis, node: str, wanted: Wanted, reason: str) -> None:
    """Give an order to a node, in place of the last one."""
    redis.hset(ORDERS_KEY, node, msgpack.packb([str(wanted), reason, time.time()]))


def pause(redis: Redis, reason: str) -> None:
    """Let every node finish what it holds and take nothing more; repeating it changes nothing."""
    redis.set(PAUSED_KEY, msgpack.packb([reason, time.time()]), nx=True)


def resume(redis: Redis) -> bool:
    """End the pause; return whether there was one."""
    return bool(redis.delete(PAUSED_KEY))


def fetch_orders(redis: Redis, node: str) -> tuple[Order | None, bool]:
    """Return the last order for a node, and whether the fleet is paused."""
    pipe = redis.pipeline(transaction=False)
    pipe.hget(ORDERS_KEY, node)
    pipe.exists(PAUSED_KEY)
    raw, paused = pipe.execute()
    return _order(raw), bool(paused)


def read_pause(raw: bytes | None) -> Pause | None:
    """Read what PAUSED_KEY holds."""
    if raw is None:
        return None
    try:
        reason, at = msgpack.unpackb(raw)
        return Pause(plain(str(reason)), float(at))
    except (ValueError, TypeError, msgpack.UnpackException):
        return Pause("", 0.0)  # somebody set the key by hand: paused is paused


def _order(raw: bytes | None) -> Order | None:
    if raw is None:
        return None
    try:
        wanted, reason, at = msgpack.unpackb(raw)
        return Order(Wanted(wanted), plain(str(reason)), float(at))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
