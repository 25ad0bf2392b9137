"""Stores the attempts of single texts in isolation mode, and the dead letters.

Attempts: one hash per job, next to its ledger, because it must survive a process that dies. Each
process has its own fields, because a batch may run twice at the same time.
Dead letters: texts that no process survived, stored with the text so that an operator can read and
resubmit them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Final, cast

import msgpack
from redis import Redis

from embedq.errors import MalformedMessage
from embedq.protocol.worker import validate_fields

#: Time to live of a job's attempts, seconds; longer than any batch takes in isolation mode.
ATTEMPT_LOG_TTL_S: Final = 86_400


# KEYS meta suspects; ARGV command field value ttl
# Writes nothing for a job that was dropped, whose key would stay in Redis.
_RECORD: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call(ARGV[1], KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class TextAttempts:
    """The attempts of one batch.

    Attributes:
        started: process -> offset of the text that it started and did not end.
        missed: process -> offset of an unfinished start that is already counted as a failure.
        charges: offset -> points for failures.
    """

    started: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    charges: dict[int, int] = field(default_factory=dict)


class AttemptLog:
    """The attempts of one job."""

    def __init__(self, client: Redis, job: str) -> None:
        self._redis = client
        self._meta = f"embedq:{{{job}}}:meta"
        self._key = suspects_key(job)
        self._record_script = client.register_script(_RECORD)

    def start(self, index: int, offset: int, process: str) -> None:
        """Record that a process starts to embed one text."""
        self._write("HSET", f"{index}@{process}", offset)

    def end(self, index: int, offset: int, process: str, *, cleared: bool) -> None:
        """Record that the process survived the text; `cleared` deletes the points of the text."""
        fields = [f"{index}@{process}", f"{index}?{process}"]
        self._redis.hdel(self._key, *fields, *([f"{index}:{offset}"] if cleared else []))

    def mark_unfinished(self, index: int, offset: int, process: str) -> None:
        """Record that a start without an end was counted; its process may be alive."""
        self._redis.hdel(self._key, f"{index}@{process}")
        self._write("HSET", f"{index}?{process}", offset)

    def add_failure(self, index: int, offset: int, points: int) -> None:
        """Add points for a failure to a text."""
        self._write("HINCRBY", f"{index}:{offset}", points)

    def fetch(self, index: int) -> TextAttempts:
        """Return the attempts of a batch."""
        attempts = TextAttempts()
        kinds = {"@": attempts.started, "?": attempts.missed}
        raws = cast(dict[bytes, bytes], self._redis.hgetall(self._key))
        for key, value in raws.items():
            name = key.decode(errors="replace").removeprefix(str(index))
            kind, rest = name[:1], name[1:]
            if not value.isdigit():
                continue  # not written by embedq
            if kind == ":" and rest.isdecimal():
                attempts.charges[int(rest)] = int(value)
            elif kind in kinds:
                kinds[kind][rest] = int(value)
        return attempts

    def _write(self, command: str, name: str, value: int) -> None:
        self._record_script(
            keys=[self._meta, self._key], args=[command, name, value, ATTEMPT_LOG_TTL_S]
        )


def suspects_key(job: str) -> str:
    """Return the key of a job's attempts."""
    return f"embedq:{{{job}}}:suspects"


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


def new(
    job: str,
    index: int,
    offset: int,
    *,
    code: str,
    reason: str,
    worker: str,
    prompt: str,
    text: str,
) -> DeadLetter:
    """Build a letter with the current time."""
    letter_id = f"{job}:{index}:{offset}"
    return DeadLetter(letter_id, code, reason, worker, time.time(), prompt, text)


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
