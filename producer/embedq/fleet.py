"""Who is alive and in which state: heartbeats in Redis, for display and for finding a model.

Never for routing: a node decides what it consumes from its own state alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final, cast

import msgpack
from redis import Redis

from embedq.card import ModelCard
from embedq.errors import MalformedMessage, NoNode
from embedq.records import checked

#: Sorted set of node names, scored by their last heartbeat.
NODES_KEY: Final = "embedq:nodes"
#: Seconds after which a silent node counts as gone.
ALIVE_S: Final = 15.0
#: Seconds after which a silent node is forgotten.
FORGET_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a node says of itself.

    Attributes:
        node: name, the same over restarts.
        state: starting, healthy, degraded, probing or failed.
        reason: why, when it is not healthy.
        since: Unix time of the last change of state, in seconds.
        device, engine, precision: what computes here.
        home: the device that the node is for; another than `device` while it is degraded.
        may_return: a degraded NPU will be tried again.
        card: the model served, or None while there is none.
        code: why it is not healthy, in a word.
        count: how often its NPU was given up in a row.
        probe_at: Unix time at which its NPU is tried again, in seconds; 0 if none is planned.
        at: Unix time of this heartbeat, in seconds.
        pid: of the node's parent process.
        totals: what its child has computed since it began; names and numbers that only rise.
    """

    node: str
    state: str
    at: float
    since: float
    pid: int
    reason: str = ""
    device: str = ""
    engine: str = ""
    precision: str = ""
    card: ModelCard | None = None
    home: str = ""
    may_return: bool = False
    code: str = ""
    totals: dict[str, float] = field(default_factory=dict)
    count: int = 0
    probe_at: float = 0.0

    def to_message(self) -> bytes:
        """Encode as msgpack."""
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def from_message(cls, raw: bytes) -> Heartbeat:
        """Decode a heartbeat; fields of a newer version are ignored.

        Raises:
            MalformedMessage: the bytes are not a heartbeat.
        """
        try:
            body = checked(cls, msgpack.unpackb(raw))
            card = body.pop("card", None)
            totals = body.pop("totals", {})
            if not all(isinstance(total, int | float) for total in totals.values()):
                raise TypeError("A total is no number.")
            return cls(**body, totals=totals, card=ModelCard.from_body(card) if card else None)
        except Exception as error:
            raise MalformedMessage(f"A heartbeat of {len(raw):,} bytes is unreadable.") from error


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
