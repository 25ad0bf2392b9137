"""Stores the heartbeats of the workers and the commands of operators.

Heartbeats are for display and for finding a model, never for routing: a worker decides from its
own state which queues it consumes. A command holds until another one replaces it.
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

#: Hash: worker -> its last command.
COMMANDS_KEY: Final = "embedq:orders"

#: Exists while the fleet is paused; holds reason and time.
PAUSED_KEY: Final = "embedq:paused"


class DesiredState(StrEnum):
    """State that an operator can command."""

    DEGRADED = "degraded"
    HEALTHY = "healthy"


class OperatorCommand(NamedTuple):
    """One command to a worker.

    Attributes:
        desired: state that the worker should have.
        reason: written by the operator.
        at: Unix time of the command, seconds.
    """

    desired: DesiredState
    reason: str
    at: float


class Pause(NamedTuple):
    """A pause of the whole fleet.

    Attributes:
        reason: written by the operator.
        at: Unix time of its start, seconds.
    """

    reason: str
    at: float


def set_desired_state(redis: Redis, worker: str, desired: DesiredState, reason: str) -> None:
    """Store a command to a worker; it replaces the last one."""
    redis.hset(COMMANDS_KEY, worker, msgpack.packb([str(desired), reason, time.time()]))


def pause(redis: Redis, reason: str) -> None:
    """Stop the consumption of all workers; does nothing if the fleet is paused already."""
    redis.set(PAUSED_KEY, msgpack.packb([reason, time.time()]), nx=True)


def resume(redis: Redis) -> bool:
    """End the pause; return whether the fleet was paused."""
    return bool(redis.delete(PAUSED_KEY))


def fetch_commands(redis: Redis, worker: str) -> tuple[OperatorCommand | None, bool]:
    """Return the last command to a worker, and whether the fleet is paused."""
    pipe = redis.pipeline(transaction=False)
    pipe.hget(COMMANDS_KEY, worker)
    pipe.exists(PAUSED_KEY)
    raw, paused = pipe.execute()
    return _decode_command(raw), bool(paused)


def read_pause(raw: bytes | None) -> Pause | None:
    """Decode the value of PAUSED_KEY."""
    if raw is None:
        return None
    try:
        reason, at = msgpack.unpackb(raw)
        return Pause(strip_control_chars(str(reason)), float(at))
    except (ValueError, TypeError, msgpack.UnpackException):
        return Pause("", 0.0)  # a key that was set by hand pauses, too


def _decode_command(raw: bytes | None) -> OperatorCommand | None:
    if raw is None:
        return None
    try:
        desired, reason, at = msgpack.unpackb(raw)
        return OperatorCommand(DesiredState(desired), strip_control_chars(str(reason)), float(at))
    except (ValueError, TypeError, msgpack.UnpackException):
        return None


#: Sorted set: worker -> Unix time of its last heartbeat.
WORKERS_KEY: Final = "embedq:workers"

#: Time without a heartbeat after which a worker no longer counts as alive, seconds.
ALIVE_S: Final = 15.0

#: Time without a heartbeat after which a worker is no longer listed, seconds.
FORGET_S: Final = 86_400.0


def publish_heartbeat(redis: Redis, heartbeat: WorkerStatus) -> None:
    """Store a worker's heartbeat, which expires after ALIVE_S."""
    pipe = redis.pipeline(transaction=False)
    pipe.set(worker_key(heartbeat.worker), heartbeat.to_message(), ex=int(ALIVE_S))
    pipe.zadd(WORKERS_KEY, {heartbeat.worker: heartbeat.at})
    pipe.zremrangebyscore(WORKERS_KEY, "-inf", heartbeat.at - FORGET_S)
    pipe.execute()


def deregister(redis: Redis, worker: str) -> None:
    """Remove a worker that shut down cleanly."""
    pipe = redis.pipeline(transaction=False)
    pipe.unlink(worker_key(worker))
    pipe.zrem(WORKERS_KEY, worker)
    pipe.execute()


def list_workers(redis: Redis) -> list[str]:
    """Return the workers with a heartbeat within the last FORGET_S."""
    names = cast(list[bytes], redis.zrangebyscore(WORKERS_KEY, time.time() - FORGET_S, "+inf"))
    return [name.decode(errors="replace") for name in names]


def list_live_workers(redis: Redis) -> list[WorkerStatus]:
    """Return the last heartbeat of every living worker, sorted by name."""
    names = list_workers(redis)
    if not names:
        return []
    raws = cast(list[bytes | None], redis.mget([worker_key(name) for name in names]))
    return decode_heartbeats(raws)


def decode_heartbeats(raws: Iterable[object]) -> list[WorkerStatus]:
    """Return the readable heartbeats, sorted by worker; other values are skipped."""
    alive = []
    for raw in raws:
        if isinstance(raw, bytes):  # not None (expired), not an error (a key of another type)
            try:
                alive.append(WorkerStatus.from_message(raw))
            except MalformedMessage:
                continue  # from a worker of another version
    return sorted(alive, key=lambda heartbeat: heartbeat.worker)


def find_model(alive: Sequence[WorkerStatus], model: str) -> ModelInfo | None:
    """Return the model info of a model, or None if no living worker serves it.

    Args:
        alive: heartbeats of the living workers.
        model: label with or without revision, or at least the first 12 characters of an identity.

    Raises:
        NoWorker: living workers serve two identities of this label.
    """
    model_infos = {
        h.model_info.identity: h.model_info
        for h in alive
        if h.model_info and _matches(h.model_info, model)
    }
    if len(model_infos) > 1:
        shown = ", ".join(sorted(identity[:12] for identity in model_infos))
        raise NoWorker(
            f"The living workers serve two versions of {model}: {shown}. "
            "Select one by its identity: EMBEDQ_MODEL=<identity>."
        )
    return next(iter(model_infos.values()), None)


def _matches(model_info: ModelInfo, model: str) -> bool:
    label = model_info.label
    if model in (label, label.partition("@")[0], label.rstrip("/")):
        return True
    return len(model) >= 12 and model_info.identity.startswith(model)


def worker_key(worker: str) -> str:
    """Return the key of a worker's heartbeat."""
    return f"embedq:worker:{worker}"
