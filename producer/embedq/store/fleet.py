"""Worker registry and operator commands.

What an operator wants of the fleet: orders in Redis, which stand until they are undone.

Who is alive and in which state: heartbeats in Redis, for display and for finding a model.

Never for routing: a worker decides what it consumes from its own state alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Final, NamedTuple, cast

import msgpack
from redis import Redis

from embedq.errors import MalformedMessage, NoWorker
from embedq.protocol.worker import ModelInfo, WorkerStatus, strip_control_chars

#: Hash: worker -> its last order.
COMMANDS_KEY: Final = "embedq:orders"


#: Exists while an operator has paused the fleet; holds why and since when.
PAUSED_KEY: Final = "embedq:paused"


class DesiredState(StrEnum):
    """What may be wanted of a worker."""

    DEGRADED = "degraded"
    HEALTHY = "healthy"


class OperatorCommand(NamedTuple):
    """One order.

    Attributes:
        wanted: of the worker.
        reason: why; a person's words.
        at: Unix time at which it was given, in seconds.
    """

    desired: DesiredState
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


def set_desired_state(redis: Redis, worker: str, wanted: DesiredState, reason: str) -> None:
    """Give an order to a worker, in place of the last one."""
    redis.hset(COMMANDS_KEY, worker, msgpack.packb([str(wanted), reason, time.time()]))


def pause(redis: Redis, reason: str) -> None:
    """Let every worker finish what it holds and take nothing more; repeating it changes nothing."""
    redis.set(PAUSED_KEY, msgpack.packb([reason, time.time()]), nx=True)


def resume(redis: Redis) -> bool:
    """End the pause; return whether there was one."""
    return bool(redis.delete(PAUSED_KEY))


def fetch_commands(redis: Redis, worker: str) -> tuple[OperatorCommand | None, bool]:
    """Return the last order for a worker, and whether the fleet is paused."""
    pipe = redis.pipeline(transaction=False)
    pipe.hget(COMMANDS_KEY, worker)
    pipe.exists(PAUSED_KEY)
    raw, paused = pipe.execute()
    return _order(raw), bool(paused)


def read_pause(raw: bytes | None) -> Pause | None:
    """Read what PAUSED_KEY holds."""
    if raw is None:
        return None
    try:
        reason, at = msgpack.unpackb(raw)
        return Pause(strip_control_chars(str(reason)), float(at))
    except (ValueError, TypeError, msgpack.UnpackException):
        return Pause("", 0.0)  # somebody set the key by hand: paused is paused


def _order(raw: bytes | None) -> OperatorCommand | None:
    if raw is None:
        return None
    try:
        wanted, reason, at = msgpack.unpackb(raw)
        return OperatorCommand(DesiredState(wanted), strip_control_chars(str(reason)), float(at))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None


#: Sorted set of worker names, scored by their last heartbeat.
WORKERS_KEY: Final = "embedq:workers"


#: Seconds after which a silent worker counts as gone.
ALIVE_S: Final = 15.0


#: Seconds after which a silent worker is forgotten.
FORGET_S: Final = 86_400.0


def publish_heartbeat(redis: Redis, heartbeat: WorkerStatus) -> None:
    """Write a worker's heartbeat; it fades by itself."""
    pipe = redis.pipeline(transaction=False)
    pipe.set(worker_key(heartbeat.worker), heartbeat.to_message(), ex=int(ALIVE_S))
    pipe.zadd(WORKERS_KEY, {heartbeat.worker: heartbeat.at})
    pipe.zremrangebyscore(WORKERS_KEY, "-inf", heartbeat.at - FORGET_S)
    pipe.execute()


def deregister(redis: Redis, worker: str) -> None:
    """Remove a worker that shut down in good order."""
    pipe = redis.pipeline(transaction=False)
    pipe.unlink(worker_key(worker))
    pipe.zrem(WORKERS_KEY, worker)
    pipe.execute()


def list_workers(redis: Redis) -> list[str]:
    """Return the names of the workers that were alive within the last day."""
    names = cast(list[bytes], redis.zrangebyscore(WORKERS_KEY, time.time() - FORGET_S, "+inf"))
    return [name.decode(errors="replace") for name in names]


def list_live_workers(redis: Redis) -> list[WorkerStatus]:
    """Return the last heartbeat of every living worker, by name."""
    names = list_workers(redis)
    if not names:
        return []
    raws = cast(list[bytes | None], redis.mget([worker_key(name) for name in names]))
    return decode_heartbeats(raws)


def decode_heartbeats(raws: Iterable[object]) -> list[WorkerStatus]:
    """Return the heartbeats that can be read, by name; None stands for one that faded."""
    alive = []
    for raw in raws:
        if isinstance(raw, bytes):  # and not the error of a key that holds something else
            try:
                alive.append(WorkerStatus.from_message(raw))
            except MalformedMessage:
                continue  # a worker of another version: it is alive, but we cannot read it
    return sorted(alive, key=lambda heartbeat: heartbeat.worker)


def find_model(alive: Sequence[WorkerStatus], model: str) -> ModelInfo | None:
    """Return the card of the model that was asked for, if a living worker serves it.

    Args:
        alive: heartbeats, as from list_live_workers.
        model: a label with or without its revision, or the first 12 or more characters of an
            identity.

    Raises:
        NoWorker: living workers serve the label under two identities.
    """
    model_infos = {
        h.model_info.identity: h.model_info
        for h in alive
        if h.model_info and _names(h.model_info, model)
    }
    if len(model_infos) > 1:
        shown = ", ".join(sorted(identity[:12] for identity in model_infos))
        raise NoWorker(
            f"The living workers serve two versions of {model}: {shown}. "
            "Ask for one by its identity: EMBEDQ_MODEL=<identity>."
        )
    return next(iter(model_infos.values()), None)


def _names(model_info: ModelInfo, model: str) -> bool:
    label = model_info.label
    if model in (label, label.partition("@")[0], label.rstrip("/")):
        return True
    return len(model) >= 12 and model_info.identity.startswith(model)


def worker_key(worker: str) -> str:
    """Return the key of a worker's heartbeat."""
    return f"embedq:worker:{worker}"
