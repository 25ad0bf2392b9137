"""Worker registry and operator commands.

What an operator wants of the fleet: orders in Redis, which stand until they are undone.

Who is alive and in which state: heartbeats in Redis, for display and for finding a model.

Never for routing: a node decides what it consumes from its own state alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

import msgpack
from redis import Redis

from embedq.errors import MalformedMessage, NoNode
from embedq.protocol.worker import Heartbeat, ModelCard, plain

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


#: Sorted set of node names, scored by their last heartbeat.
NODES_KEY: Final = "embedq:nodes"


#: Seconds after which a silent node counts as gone.
ALIVE_S: Final = 15.0


#: Seconds after which a silent node is forgotten.
FORGET_S: Final = 86_400.0


def beat(redis: Redis, heartbeat: Heartbeat) -> None:
    """Write a node's heartbeat; it fades by itself."""
    pipe = redis.pipeline(transaction=False)
    pipe.set(node_key(heartbeat.node), heartbeat.to_message(), ex=int(ALIVE_S))
    pipe.zadd(NODES_KEY, {heartbeat.node: heartbeat.at})
    pipe.zremrangebyscore(NODES_KEY, "-inf", heartbeat.at - FORGET_S)
    pipe.execute()


def leave(redis: Redis, node: str) -> None:
    """Remove a node that shut down in good order."""
    pipe = redis.pipeline(transaction=False)
    pipe.unlink(node_key(node))
    pipe.zrem(NODES_KEY, node)
    pipe.execute()


def fetch_known(redis: Redis) -> list[str]:
    """Return the names of the nodes that were alive within the last day."""
    names = cast(list[bytes], redis.zrangebyscore(NODES_KEY, time.time() - FORGET_S, "+inf"))
    return [name.decode(errors="replace") for name in names]


def fetch_alive(redis: Redis) -> list[Heartbeat]:
    """Return the last heartbeat of every living node, by name."""
    names = fetch_known(redis)
    if not names:
        return []
    raws = cast(list[bytes | None], redis.mget([node_key(name) for name in names]))
    return read_beats(raws)


def read_beats(raws: Iterable[object]) -> list[Heartbeat]:
    """Return the heartbeats that can be read, by name; None stands for one that faded."""
    alive = []
    for raw in raws:
        if isinstance(raw, bytes):  # and not the error of a key that holds something else
            try:
                alive.append(Heartbeat.from_message(raw))
            except MalformedMessage:
                continue  # a node of another version: it is alive, but we cannot read it
    return sorted(alive, key=lambda heartbeat: heartbeat.node)


def find_card(alive: Sequence[Heartbeat], model: str) -> ModelCard | None:
    """Return the card of the model that was asked for, if a living node serves it.

    Args:
        alive: heartbeats, as from fetch_alive.
        model: a label with or without its revision, or the first 12 or more characters of an
            identity.

    Raises:
        NoNode: living nodes serve the label under two identities.
    """
    cards = {h.card.identity: h.card for h in alive if h.card and _names(h.card, model)}
    if len(cards) > 1:
        shown = ", ".join(sorted(identity[:12] for identity in cards))
        raise NoNode(
            f"The living nodes serve two versions of {model}: {shown}. "
            "Ask for one by its identity: EMBEDQ_MODEL=<identity>."
        )
    return next(iter(cards.values()), None)


def _names(card: ModelCard, model: str) -> bool:
    label = card.label
    if model in (label, label.partition("@")[0], label.rstrip("/")):
        return True
    return len(model) >= 12 and card.identity.startswith(model)


def node_key(node: str) -> str:
    """Return the key of a node's heartbeat."""
    return f"embedq:node:{node}"
