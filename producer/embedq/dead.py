"""Texts that were set aside because they stop whatever tries to embed them.

Kept in the results Redis with the text itself, so that a person can look and try again; they fade
after a week, and there are never more than a thousand.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final, cast

import msgpack
from redis import Redis

from embedq.errors import MalformedMessage
from embedq.records import checked

#: Hash of all dead letters by id.
DEAD_KEY: Final = "embedq:dead"
#: Seconds after which they fade, counted from the newest.
TTL_S: Final = 7 * 86_400
#: Most letters kept.
MOST: Final = 1_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One text that was set aside.

    Attributes:
        id: job, batch and offset.
        code: why, as in its outcome.
        reason: why, as a sentence.
        node: that set it aside.
        at: Unix time, in seconds.
        prompt: that was put before it.
        text: the text itself.
    """

    id: str
    code: str
    reason: str
    node: str
    at: float
    prompt: str = field(default="", repr=False)
    text: str = field(default="", repr=False)


def add(redis: Redis, letter: DeadLetter) -> None:
    """Keep a letter; beyond the limit it is dropped, for its outcome tells of it too."""
    if redis.hlen(DEAD_KEY) >= MOST:
        return
    redis.hsetnx(DEAD_KEY, letter.id, msgpack.packb(asdict(letter)))
    redis.expire(DEAD_KEY, TTL_S)


def fetch_all(redis: Redis) -> list[DeadLetter]:
    """Return all letters, newest first."""
    raws = cast(dict[bytes, bytes], redis.hgetall(DEAD_KEY))
    letters = [_readable(key.decode(errors="replace"), raw) for key, raw in raws.items()]
    return sorted(letters, key=lambda letter: -letter.at)


def fetch(redis: Redis, name: str) -> DeadLetter | None:
    """Return one letter, or None."""
    raw = cast(bytes | None, redis.hget(DEAD_KEY, name))
    return None if raw is None else _from_message(raw)


def drop(redis: Redis, names: Sequence[str]) -> int:
    """Delete letters and return how many there were."""
    return redis.hdel(DEAD_KEY, *names) if names else 0


def new(
    job: str, index: int, offset: int, *, code: str, reason: str, node: str, prompt: str, text: str
) -> DeadLetter:
    """Make a letter of this moment."""
    name = f"{job}:{index}:{offset}"
    return DeadLetter(name, code, reason, node, time.time(), prompt, text)


def _readable(name: str, raw: bytes) -> DeadLetter:
    """Read a letter; of one that cannot be read, its name is enough to drop it."""
    try:
        return replace(_from_message(raw), id=name)
    except MalformedMessage as error:
        return DeadLetter(name, error.code, str(error), "", 0.0)


def _from_message(raw: bytes) -> DeadLetter:
    try:
        return DeadLetter(**checked(DeadLetter, msgpack.unpackb(raw)))
    except Exception as error:
        raise MalformedMessage(f"A dead letter of {len(raw):,} bytes is unreadable.") from error
