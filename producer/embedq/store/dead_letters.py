"""Dead letters and the attempts of each text.

Texts that a job's isolation mode tries one by one, noted where no dying process takes them along.

One hash per job, beside its ledger. Each process has notes of its own, because a batch may run
twice at the same time.

Texts that were set aside because they stop whatever tries to embed them.

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
from embedq.protocol.worker import validate_fields

#: Life of the notes, in seconds: longer than any batch takes text by text.
ATTEMPT_LOG_TTL_S: Final = 86_400


# KEYS meta suspects; ARGV verb name value ttl
# A job that was dropped meanwhile must not come back to life as notes.
_NOTE: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call(ARGV[1], KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class TextAttempts:
    """What is noted of a batch.

    Attributes:
        started: process -> offset of the text it has started and not ended.
        missed: the same, of starts that somebody has seen before.
        charges: offset -> points for failures.
    """

    started: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    charges: dict[int, int] = field(default_factory=dict)


class AttemptLog:
    """The notes of one job."""

    def __init__(self, client: Redis, job: str) -> None:
        self._redis = client
        self._meta = f"embedq:{{{job}}}:meta"
        self._key = suspects_key(job)
        self._record_script = client.register_script(_NOTE)

    def start(self, index: int, offset: int, process: str) -> None:
        """Note that a process tries a text on its own."""
        self._write("HSET", f"{index}@{process}", offset)

    def end(self, index: int, offset: int, process: str, *, cleared: bool) -> None:
        """Note that the process is done with that text; a cleared one is charged with nothing."""
        fields = [f"{index}@{process}", f"{index}?{process}"]
        self._redis.hdel(self._key, *fields, *([f"{index}:{offset}"] if cleared else []))

    def mark_unfinished(self, index: int, offset: int, process: str) -> None:
        """Note that we have seen a start without an end; its process may be dead, or at it."""
        self._redis.hdel(self._key, f"{index}@{process}")
        self._write("HSET", f"{index}?{process}", offset)

    def add_failure(self, index: int, offset: int, points: int) -> None:
        """Charge a text with a failure."""
        self._write("HINCRBY", f"{index}:{offset}", points)

    def fetch(self, index: int) -> TextAttempts:
        """Return what is noted of a batch."""
        notes = TextAttempts()
        kinds = {"@": notes.started, "?": notes.missed}
        raws = cast(dict[bytes, bytes], self._redis.hgetall(self._key))
        for key, value in raws.items():
            name = key.decode(errors="replace").removeprefix(str(index))
            kind, rest = name[:1], name[1:]
            if not value.isdigit():
                continue  # nobody of ours wrote it
            if kind == ":" and rest.isdecimal():
                notes.charges[int(rest)] = int(value)
            elif kind in kinds:
                kinds[kind][rest] = int(value)
        return notes

    def _write(self, verb: str, name: str, value: int) -> None:
        self._record_script(
            keys=[self._meta, self._key], args=[verb, name, value, ATTEMPT_LOG_TTL_S]
        )


def suspects_key(job: str) -> str:
    """Return the key of a job's notes."""
    return f"embedq:{{{job}}}:suspects"


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
        worker: that set it aside.
        at: Unix time, in seconds.
        prompt: that was put before it.
        text: the text itself.
    """

    id: str
    code: str
    reason: str
    worker: str
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
    """Make a letter of this moment."""
    name = f"{job}:{index}:{offset}"
    return DeadLetter(name, code, reason, worker, time.time(), prompt, text)


def _readable(name: str, raw: bytes) -> DeadLetter:
    """Read a letter; of one that cannot be read, its name is enough to drop it."""
    try:
        return replace(_from_message(raw), id=name)
    except MalformedMessage as error:
        return DeadLetter(name, error.code, str(error), "", 0.0)


def _from_message(raw: bytes) -> DeadLetter:
    try:
        return DeadLetter(**validate_fields(DeadLetter, msgpack.unpackb(raw)))
    except Exception as error:
        raise MalformedMessage(f"A dead letter of {len(raw):,} bytes is unreadable.") from error
