"""Stores the texts that no process survived, so that an operator can read and resubmit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final, cast

import msgpack
from redis import Redis

from embedq.errors import MalformedMessage
from embedq.protocol.worker import validate_fields

#: Hash: id -> dead letter.
DEAD_KEY: Final = "embedq:dead"

#: Time to live of all dead letters after the newest one, seconds.
DEAD_LETTER_TTL_S: Final = 7 * 86_400

#: Maximum number of dead letters.
MAX_DEAD_LETTERS: Final = 1_000


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One text that no process survived.

    Attributes:
        id: `job:index:offset`.
        code: code of its outcome.
        reason: the last failure, as a sentence.
        worker: worker that dead-lettered the text.
        at: Unix time, seconds.
        prompt: prompt in front of the text.
        text: the text.
    """

    id: str
    code: str
    reason: str
    worker: str
    at: float
    prompt: str = field(default="", repr=False)
    text: str = field(default="", repr=False)


def add(redis: Redis, letter: DeadLetter) -> None:
    """Store a letter, unless MAX_DEAD_LETTERS are stored; the outcome reports the text anyway."""
    if redis.hlen(DEAD_KEY) >= MAX_DEAD_LETTERS:
        return
    redis.hsetnx(DEAD_KEY, letter.id, msgpack.packb(asdict(letter)))
    redis.expire(DEAD_KEY, DEAD_LETTER_TTL_S)


def fetch_all(redis: Redis) -> list[DeadLetter]:
    """Return all letters, newest first."""
    raws = cast(dict[bytes, bytes], redis.hgetall(DEAD_KEY))
    letters = [_readable(key.decode(errors="replace"), raw) for key, raw in raws.items()]
    return sorted(letters, key=lambda letter: -letter.at)


def fetch(redis: Redis, letter_id: str) -> DeadLetter | None:
    """Return one letter, or None if there is no such letter."""
    raw = cast(bytes | None, redis.hget(DEAD_KEY, letter_id))
    return None if raw is None else _from_message(raw)


def drop(redis: Redis, letter_ids: Sequence[str]) -> int:
    """Delete letters and return how many existed."""
    return redis.hdel(DEAD_KEY, *letter_ids) if letter_ids else 0


def _readable(letter_id: str, raw: bytes) -> DeadLetter:
    try:
        return replace(_from_message(raw), id=letter_id)
    except MalformedMessage as error:
        # Listed by its id, so that an operator can drop it.
        return DeadLetter(letter_id, error.code, str(error), "", 0.0)


def _from_message(raw: bytes) -> DeadLetter:
    try:
        return DeadLetter(**validate_fields(DeadLetter, msgpack.unpackb(raw)))
    except Exception as error:
        raise MalformedMessage(
            f"A dead letter of {len(raw):,} bytes is unreadable. Delete it: embedq dead drop ID."
        ) from error
