"""Stores the commit log of each job in Redis.

Celery may lose, duplicate or reorder messages, so a batch is done only when the commit script has
accepted it. The script accepts each batch once. A second log, of the attempts at single texts, is
for isolation mode.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, cast

from redis import Redis

from embedq.protocol.contract import MAX_BATCH_TEXTS, MAX_BATCHES

# Scripts that may write a key check first that the job exists: a key without it would never expire.

# KEYS meta bits tries; ARGV index
START_ATTEMPT: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {'gone', 0} end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return {'committed', 0} end
local tries = redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
redis.call('EXPIRE', KEYS[3], redis.call('HGET', KEYS[1], 'ttl'))
return {'go', tries}
"""

# KEYS meta bits commits tries staged, n values, their n sources; ARGV index n_texts, n values
# The first writer wins. An empty value is staged at its source and is renamed. Other values are
# written first: a Redis that is full refuses a script at its first write or not at all.
COMMIT: Final = """
local n = #ARGV - 2
local sources = {}
for i = 1, n do
  if ARGV[2 + i] == '' then sources[#sources + 1] = KEYS[5 + n + i] end
end
local gone = redis.call('EXISTS', KEYS[1]) == 0
if gone or redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then
  if #sources > 0 then
    redis.call('UNLINK', unpack(sources))
    redis.call('SREM', KEYS[5], unpack(sources))
  end
  return gone and -1 or 0
end
if #sources > 0 and redis.call('EXISTS', unpack(sources)) < #sources then return -2 end
local ttl = redis.call('HGET', KEYS[1], 'ttl')
for i = 1, n do
  if ARGV[2 + i] ~= '' then redis.call('SET', KEYS[5 + i], ARGV[2 + i], 'EX', ttl) end
end
for i = 1, n do
  if ARGV[2 + i] == '' then
    redis.call('RENAME', KEYS[5 + n + i], KEYS[5 + i])
    redis.call('EXPIRE', KEYS[5 + i], ttl)
  end
end
redis.call('SETBIT', KEYS[2], ARGV[1], 1)
redis.call('XADD', KEYS[3], '*', 'i', ARGV[1], 'v', n)
redis.call('HINCRBY', KEYS[1], 'texts', ARGV[2])
redis.call('HDEL', KEYS[4], ARGV[1])
if #sources > 0 then redis.call('SREM', KEYS[5], unpack(sources)) end
for i = 1, 3 do redis.call('EXPIRE', KEYS[i], ttl) end
return 1
"""

# KEYS meta tries; ARGV index
UNDO_ATTEMPT: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0') < 1 then return 0 end
return redis.call('HINCRBY', KEYS[2], ARGV[1], -1)
"""

# KEYS bits commits; ARGV index
# Deletes a bit without its entry, as after an eviction: the batch would never be computed again.
REPAIR_COMMIT: Final = """
if redis.call('GETBIT', KEYS[1], ARGV[1]) == 0 then return 0 end
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'i' and entry[2][i + 1] == ARGV[1] then return 1 end
  end
end
redis.call('SETBIT', KEYS[1], ARGV[1], 0)
return 0
"""

# KEYS bits commits, n values; ARGV index entry
INVALIDATE: Final = """
redis.call('XDEL', KEYS[2], ARGV[2])
if #KEYS > 2 then redis.call('UNLINK', unpack(KEYS, 3)) end
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('SETBIT', KEYS[1], ARGV[1], 0) end
"""

# KEYS meta; ARGV field value... Only an existing job is updated: a new key would never expire.
REPORT_PROGRESS: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], unpack(ARGV)) end
"""

#: Time to live of a value before its commit, seconds; a later commit uploads it again.
STAGED_TTL_S: Final = 300


def job_key(job: str, name: str) -> str:
    """Return a key of a job. Its hash tag stores all keys of the job on one shard of a cluster."""
    return f"embedq:{{{job}}}:{name}"


class StagedValues:
    """Uploads values of a batch before its commit, so that the commit of a large batch is short.

    The keys belong to one execution of the batch; the commit renames them. One thread at a time.
    """

    def __init__(self, client: Redis, job: str, index: int) -> None:
        self._redis = client
        self._index = index
        self._meta, self._bits, self._registry = (
            job_key(job, name) for name in ("meta", "bits", "staged")
        )
        self._prefix = job_key(job, f"s:{index}:{secrets.token_hex(4)}:")
        #: Number of a staged value -> its key.
        self.keys: dict[int, str] = {}

    def write(self, part: int, value: bytes) -> bool:
        """Stage one value.

        Returns:
            False if the job is gone or the batch is committed; everything staged is deleted then.
        """
        key = f"{self._prefix}{part}"
        pipe = self._redis.pipeline()
        pipe.exists(self._meta)
        pipe.getbit(self._bits, self._index)
        # Registered in the same transaction, so that Ledger.drop finds the key.
        pipe.sadd(self._registry, key)
        pipe.expire(self._registry, STAGED_TTL_S)
        pipe.set(key, value, ex=STAGED_TTL_S)
        exists, committed, *_ = pipe.execute()
        self.keys[part] = key
        if exists and not committed:
            return True
        self.discard()
        return False

    def discard(self) -> None:
        """Delete all staged values."""
        if self.keys:
            pipe = self._redis.pipeline()
            pipe.unlink(*self.keys.values())
            pipe.srem(self._registry, *self.keys.values())
            pipe.execute()
            self.keys.clear()


#: Sorted set: job -> Unix time of its start; `embedq status` lists it.
JOBS_KEY: Final = "embedq:jobs"


class Attempt(StrEnum):
    """What a worker does with a received batch."""

    RUN = "go"
    JOB_EXPIRED = "gone"
    ALREADY_DONE = "committed"


class StagedValuesExpired(Exception):
    """Staged values have expired; commit again with the values themselves."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One entry of a job's stream of commits.

    Attributes:
        entry: id in the stream.
        index: batch; -1 in an entry that embedq did not write.
        n_values: number of values that hold its vectors.
    """

    entry: bytes
    index: int
    n_values: int


class Ledger:
    """The ledger of one job."""

    def __init__(self, client: Redis, job: str) -> None:
        self._redis = client
        self._job = job
        self._meta, self._bits, self._commits, self._tries, self._staged, self._suspects = (
            job_key(job, name)
            for name in ("meta", "bits", "commits", "tries", "staged", "suspects")
        )
        self._start_attempt = client.register_script(START_ATTEMPT)
        self._undo_attempt = client.register_script(UNDO_ATTEMPT)
        self._commit = client.register_script(COMMIT)
        self._invalidate = client.register_script(INVALIDATE)
        self._repair_commit = client.register_script(REPAIR_COMMIT)
        self._report_progress = client.register_script(REPORT_PROGRESS)

    def open(self, *, fingerprint: bytes, ttl_s: int, label: str = "") -> None:
        """Create the job; repeating it is harmless."""
        pipe = self._redis.pipeline()
        pipe.hsetnx(self._meta, "created", f"{time.time():.3f}")
        pipe.hset(
            self._meta,
            mapping={"ttl": ttl_s, "fingerprint": fingerprint.hex(), "label": label},
        )
        pipe.expire(self._meta, ttl_s)
        pipe.zadd(JOBS_KEY, {self._job: time.time()}, nx=True)
        pipe.execute()

    def start_attempt(self, index: int) -> tuple[Attempt, int]:
        """Check whether a batch is to be computed, and count the attempt if so.

        Returns:
            What to do, and the number of attempts without a commit, with this one.
        """
        verdict, tries = cast(
            tuple[bytes, int],
            self._start_attempt(keys=[self._meta, self._bits, self._tries], args=[index]),
        )
        return Attempt(verdict.decode()), tries

    def undo_attempt(self, index: int) -> None:
        """Uncount the last attempt, which ended for a reason other than the batch."""
        self._undo_attempt(keys=[self._meta, self._tries], args=[index])

    def commit(self, index: int, values: Sequence[bytes | str], *, n_texts: int = 0) -> bool | None:
        """Write the values of a batch and mark it committed, atomically and once.

        Args:
            index: batch.
            values: vectors and outcomes, each as bytes or as the key at which it is staged.
            n_texts: texts in the batch, for `embedq status`.

        Returns:
            True if this call committed, False if another one had, None if the job is gone.

        Raises:
            StagedValuesExpired: a staged value is missing; nothing was written.
        """
        targets = [self._value_key(index, part) for part in range(len(values))]
        sources = [
            value if isinstance(value, str) else target
            for value, target in zip(values, targets, strict=True)
        ]
        sent = [b"" if isinstance(value, str) else value for value in values]
        keys = [self._meta, self._bits, self._commits, self._tries, self._staged]
        keys += targets + sources
        answer = int(cast(int, self._commit(keys=keys, args=[index, n_texts, *sent])))
        if answer == -2:
            raise StagedValuesExpired
        return {1: True, 0: False, -1: None}[answer]

    def exists(self) -> bool:
        """Return whether the job exists in Redis."""
        return bool(self._redis.exists(self._meta))

    def is_committed(self, index: int) -> bool:
        """Return whether a batch is committed."""
        return bool(self._redis.getbit(self._bits, index))

    def has_readable_commit(self, index: int) -> bool:
        """Return whether a batch has a commit in the stream; if not, it can be committed again."""
        return bool(self._repair_commit(keys=[self._bits, self._commits], args=[index]))

    def read_commits(self, *, count: int, block_ms: int) -> list[Commit]:
        """Return the first commits in the stream, waiting up to block_ms for one.

        Reads from the start, because acknowledged entries are deleted, and because a Redis that
        lost its data may number new entries below the old ones.
        """
        answer = cast(
            list[tuple[bytes, list[tuple[bytes, dict[bytes, bytes]]]]],
            self._redis.xread({self._commits: "0-0"}, count=count, block=block_ms),
        )
        if not answer:
            return []
        [(_, entries)] = answer
        return [_commit(entry, body) for entry, body in entries]

    def fetch_values(self, commit: Commit) -> list[bytes | None]:
        """Fetch the values of a committed batch; None for an expired one."""
        keys = self._value_keys(commit)
        return cast(list[bytes | None], self._redis.mget(keys)) if keys else []

    def acknowledge(self, commits: Sequence[Commit]) -> None:
        """Delete the values and stream entries of batches that were fetched."""
        pipe = self._redis.pipeline(transaction=False)
        for commit in commits:
            if keys := self._value_keys(commit):
                pipe.unlink(*keys)
            pipe.xdel(self._commits, commit.entry)
        pipe.execute()

    def invalidate(self, commit: Commit) -> None:
        """Delete a commit and its values, so that the batch can be computed again.

        Call it before publishing the batch again, whose next commit uses the same keys.
        """
        keys = [self._bits, self._commits, *self._value_keys(commit)]
        self._invalidate(keys=keys, args=[commit.index, commit.entry])

    def report_progress(self, *, published: int, planned: int | None) -> None:
        """Store how far the producer is, for `embedq status` and metrics.

        Args:
            published: batches published so far.
            planned: texts of the whole job; None while the producer does not know.
        """
        fields: list[str | int] = ["published", published]
        if planned is not None:
            fields += ["planned", planned]
        self._report_progress(keys=[self._meta], args=fields)

    def keep_alive(self, ttl_s: int) -> None:
        """Extend the time to live of the job."""
        pipe = self._redis.pipeline(transaction=False)
        for key in (self._meta, self._bits, self._commits):
            pipe.expire(key, ttl_s)
        pipe.execute()

    def drop(self) -> None:
        """Delete the job with all its keys; workers then skip its queued batches."""
        # First the job itself: commits are refused from then on.
        self._redis.unlink(self._meta)
        entries = cast(
            list[tuple[bytes, dict[bytes, bytes]]], self._redis.xrange(self._commits, "-", "+")
        )
        pipe = self._redis.pipeline(transaction=False)
        for entry, body in entries:
            if keys := self._value_keys(_commit(entry, body)):
                pipe.unlink(*keys)
        staged = cast(set[bytes], self._redis.smembers(self._staged))
        pipe.unlink(*staged, self._bits, self._commits, self._tries, self._suspects, self._staged)
        pipe.zrem(JOBS_KEY, self._job)
        pipe.execute()

    def _value_keys(self, commit: Commit) -> list[str]:
        return [self._value_key(commit.index, part) for part in range(commit.n_values)]

    def _value_key(self, index: int, part: int) -> str:
        return job_key(self._job, f"v:{index}:{part}")


def _commit(entry: bytes, body: dict[bytes, bytes]) -> Commit:
    index = _number(body.get(b"i"), MAX_BATCHES - 1, default=-1)
    n_values = _number(body.get(b"v"), MAX_BATCH_TEXTS, default=0)  # a value has at least one row
    return Commit(entry, index, n_values)


def _number(raw: bytes | None, maximum: int, *, default: int) -> int:
    if raw is None or len(raw) > len(str(maximum)) or not raw.isdigit() or int(raw) > maximum:
        return default
    return int(raw)


#: Time to live of a job's attempts, seconds; longer than any batch takes in isolation mode.
ATTEMPT_LOG_TTL_S: Final = 86_400

# KEYS meta suspects; ARGV command field value ttl
RECORD_TEXT_ATTEMPT: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call(ARGV[1], KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class TextAttempts:
    """The attempts of one batch in isolation mode.

    Attributes:
        started: process -> offset of the text that it started and did not end.
        unfinished: process -> offset of a start without an end that is counted as a failure.
        points: offset -> points for failures.
    """

    started: dict[str, int] = field(default_factory=dict)
    unfinished: dict[str, int] = field(default_factory=dict)
    points: dict[int, int] = field(default_factory=dict)


class AttemptLog:
    """The attempts of one job at single texts; survives a process that dies.

    Each process has its own fields, because a batch may run twice at the same time.
    """

    def __init__(self, client: Redis, job: str) -> None:
        self._redis = client
        self._meta, self._key = job_key(job, "meta"), job_key(job, "suspects")
        self._record_script = client.register_script(RECORD_TEXT_ATTEMPT)

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
        kinds = {"@": attempts.started, "?": attempts.unfinished}
        raws = cast(dict[bytes, bytes], self._redis.hgetall(self._key))
        for key, value in raws.items():
            name = key.decode(errors="replace").removeprefix(str(index))
            kind, rest = name[:1], name[1:]
            if not value.isdigit():
                continue  # not written by embedq
            if kind == ":" and rest.isdecimal():
                attempts.points[int(rest)] = int(value)
            elif kind in kinds:
                kinds[kind][rest] = int(value)
        return attempts

    def _write(self, command: str, name: str, value: int) -> None:
        self._record_script(
            keys=[self._meta, self._key], args=[command, name, value, ATTEMPT_LOG_TTL_S]
        )
