"""Per-job commit log in Redis.

The ledger's Lua: what must happen in Redis at once or not at all.

Every script looks first whether the job still exists: a key written later would live for ever.

Values written ahead of their commit, so that a large batch is committed in a moment.

A worker writes the vectors that it has while it still computes others, under keys of its own
execution; the commit renames them into place. Nobody reads them before that. They fade by
themselves, and go with the job.

A job's truth in Redis: which batches are committed, where their vectors are, what was given up.

Celery may lose, repeat or reorder messages; nothing counts until the commit script has run, and it
runs once for each batch. Keys of a job share a hash tag, so a cluster keeps a job on one shard.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, cast

from redis import Redis

from embedq.protocol.contract import MAX_BATCH_TEXTS, MAX_BATCHES
from embedq.store.dead_letters import suspects_key

# KEYS meta bits tries; ARGV index
START_ATTEMPT: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return {'gone', 0} end
if redis.call('GETBIT', KEYS[2], ARGV[1]) == 1 then return {'committed', 0} end
local tries = redis.call('HINCRBY', KEYS[3], ARGV[1], 1)
redis.call('EXPIRE', KEYS[3], redis.call('HGET', KEYS[1], 'ttl'))
return {'go', tries}
"""


# KEYS meta bits commits tries staged, n values, their n sources; ARGV index n_texts, n values
# The first writer wins. A value that is '' lies at its source and is renamed. The others go first:
# under memory pressure Redis refuses a script at its first write or not at all.
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


# KEYS bits commits; ARGV index. A bit without its entry, as after an eviction, would keep the batch
# from being computed and its producer from ever hearing of it.
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


#: Life of a value that nobody commits, in seconds; a commit that comes later sends it again.
STAGED_TTL_S: Final = 300


def staged_key(job: str) -> str:
    """Return the key of the set that names what is staged of a job."""
    return f"embedq:{{{job}}}:staged"


class StagedValues:
    """What one execution of a batch has written ahead; one thread at a time."""

    def __init__(self, client: Redis, job: str, index: int) -> None:
        self._redis = client
        self._prefix = f"embedq:{{{job}}}:"
        self._registry = staged_key(job)
        self._index = index
        self._execution = secrets.token_hex(4)
        #: Number of each value that is staged -> its key.
        self.keys: dict[int, str] = {}

    def write(self, part: int, value: bytes) -> bool:
        """Write one value ahead.

        Returns:
            False if nobody wants it any more: the job is gone, or the batch committed.
        """
        key = f"{self._prefix}s:{self._index}:{self._execution}:{part}"
        pipe = self._redis.pipeline()
        pipe.exists(self._prefix + "meta")
        pipe.getbit(self._prefix + "bits", self._index)
        # Named in the same step, so that whoever drops the job after this one finds it.
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
        """Delete what is staged."""
        if self.keys:
            pipe = self._redis.pipeline()
            pipe.unlink(*self.keys.values())
            pipe.srem(self._registry, *self.keys.values())
            pipe.execute()
            self.keys.clear()


#: Sorted set of living jobs, scored by their start; what `embedq status` lists.
JOBS_KEY: Final = "embedq:jobs"


class Attempt(StrEnum):
    """What a worker should do with a batch it was handed."""

    RUN = "go"
    JOB_EXPIRED = "gone"
    ALREADY_DONE = "committed"


class StagedValuesExpired(Exception):
    """Values that were written ahead have left Redis; commit again with the values themselves."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One entry of a job's stream: a batch whose vectors are ready.

    Attributes:
        entry: id in the stream.
        index: the batch; -1 for an entry that names none.
        n_values: how many values hold its vectors.
    """

    entry: bytes
    index: int
    n_values: int


class Ledger:
    """The ledger of one job."""

    def __init__(self, client: Redis, job: str) -> None:
        self._redis = client
        self._job = job
        prefix = f"embedq:{{{job}}}:"
        self._meta, self._bits, self._commits, self._tries = (
            prefix + name for name in ("meta", "bits", "commits", "tries")
        )
        self._suspects, self._staged = suspects_key(job), staged_key(job)
        self._value_prefix = prefix + "v:"
        self._start_attempt = client.register_script(START_ATTEMPT)
        self._undo_attempt = client.register_script(UNDO_ATTEMPT)
        self._commit = client.register_script(COMMIT)
        self._invalidate = client.register_script(INVALIDATE)
        self._repair_commit = client.register_script(REPAIR_COMMIT)

    def open(self, *, fingerprint: bytes, ttl_s: int, label: str = "") -> None:
        """Create the job, or find it again; repeating it changes nothing."""
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
        """Ask whether a batch still wants computing, and count the delivery if so.

        Returns:
            The verdict, and how many times this batch was begun without being committed.
        """
        verdict, tries = cast(
            tuple[bytes, int],
            self._start_attempt(keys=[self._meta, self._bits, self._tries], args=[index]),
        )
        return Attempt(verdict.decode()), tries

    def undo_attempt(self, index: int) -> None:
        """Take back the count of the last delivery: what ended it was not the batch's doing."""
        self._undo_attempt(keys=[self._meta, self._tries], args=[index])

    def commit(self, index: int, values: Sequence[bytes | str], *, n_texts: int = 0) -> bool | None:
        """Write a batch's values and mark it committed, all or nothing, first writer only.

        Args:
            index: the batch.
            values: its vectors and outcomes, each as bytes, or as the key where it is staged.
            n_texts: texts in it, for whoever watches the job.

        Returns:
            True if this call committed, False if another had, None if the job is gone.

        Raises:
            StagedValuesExpired: a staged value is no longer there; nothing was written.
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
        """Tell whether Redis still knows the job."""
        return bool(self._redis.exists(self._meta))

    def is_committed(self, index: int) -> bool:
        """Tell whether a batch has been committed."""
        return bool(self._redis.getbit(self._bits, index))

    def has_readable_commit(self, index: int) -> bool:
        """Tell whether a batch has a commit that can be read; if not, it may be committed anew."""
        return bool(self._repair_commit(keys=[self._bits, self._commits], args=[index]))

    def read_commits(self, *, count: int, block_ms: int) -> list[Commit]:
        """Return the first commits that were not taken, waiting up to block_ms for one.

        From the beginning: entries are deleted as they are taken, and a Redis that begins anew may
        number its own below those that were.
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
        """Fetch the values of a committed batch; None stands for an expired one."""
        keys = self._value_keys(commit)
        return cast(list[bytes | None], self._redis.mget(keys)) if keys else []

    def acknowledge(self, commits: Sequence[Commit]) -> None:
        """Delete the values and stream entries of batches that the caller now holds."""
        pipe = self._redis.pipeline(transaction=False)
        for commit in commits:
            if keys := self._value_keys(commit):
                pipe.unlink(*keys)
            pipe.xdel(self._commits, commit.entry)
        pipe.execute()

    def invalidate(self, commit: Commit) -> None:
        """Take a commit back with all that is left of it, so that the batch can be computed again.

        At once, and before it is published: a worker that commits it again uses the same keys.
        """
        keys = [self._bits, self._commits, *self._value_keys(commit)]
        self._invalidate(keys=keys, args=[commit.index, commit.entry])

    def keep_alive(self, ttl_s: int) -> None:
        """Put off the end of the job's keys."""
        pipe = self._redis.pipeline(transaction=False)
        for key in (self._meta, self._bits, self._commits):
            pipe.expire(key, ttl_s)
        pipe.execute()

    def drop(self) -> None:
        """Delete everything of the job; batches still queued find it gone and are dropped."""
        # The job itself first: no commit can add to it after that.
        self._redis.unlink(self._meta)
        entries = cast(
            list[tuple[bytes, dict[bytes, bytes]]], self._redis.xrange(self._commits, "-", "+")
        )
        pipe = self._redis.pipeline(transaction=False)
        for entry, body in entries:
            if keys := self._value_keys(_commit(entry, body)):
                pipe.unlink(*keys)
        ahead = cast(set[bytes], self._redis.smembers(self._staged))
        pipe.unlink(*ahead, self._bits, self._commits, self._tries, self._suspects, self._staged)
        pipe.zrem(JOBS_KEY, self._job)
        pipe.execute()

    def _value_keys(self, commit: Commit) -> list[str]:
        return [self._value_key(commit.index, part) for part in range(commit.n_values)]

    def _value_key(self, index: int, part: int) -> str:
        return f"{self._value_prefix}{index}:{part}"


def _commit(entry: bytes, body: dict[bytes, bytes]) -> Commit:
    """Read an entry; one that no worker wrote is of no batch, or of one without values."""
    index = _number(body.get(b"i"), MAX_BATCHES - 1)
    n_values = _number(body.get(b"v"), MAX_BATCH_TEXTS)  # each holds a row or more
    return Commit(entry, -1 if index is None else index, n_values or 0)


def _number(raw: bytes | None, most: int) -> int | None:
    """Return a count of Redis, or None if it is none or too large."""
    if raw is None or len(raw) > len(str(most)) or not raw.isdigit() or int(raw) > most:
        return None
    return int(raw)
