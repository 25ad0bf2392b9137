"""Reads queues, unacknowledged messages and memory use from the broker, without Celery."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, cast

from redis import Redis
from redis.exceptions import ResponseError

from embedq.protocol.contract import Queue
from embedq.store.fleet import PAUSED_KEY, list_live_workers

#: Kombu's hash: delivery tag -> message that a worker received and has not acknowledged.
UNACKED_KEY: Final = "unacked"

#: Kombu's sorted set: delivery tag -> Unix time of the last renewal of its lease.
UNACKED_INDEX_KEY: Final = "unacked_index"

# KEYS unacked, queues; ARGV task ids
# Returns the ids that are in unacked, and the publish time of the oldest message of each queue.
# Kombu writes a message as JSON with the headers behind the body, so the end of it is enough.
_SNAPSHOT: Final = """
local found, oldest = {}, {}
for _, message in ipairs(redis.call('HVALS', KEYS[1])) do
  local tail = string.sub(message, -8192)
  for _, id in ipairs(ARGV) do
    if string.find(tail, id, 1, true) then found[#found + 1] = id end
  end
end
for i = 2, #KEYS do
  local message = redis.call('LINDEX', KEYS[i], -1)
  local published = ''
  if message then
    published = string.match(string.sub(message, -8192), 'published[\\\\"]+: ([%d.]+)') or '0'
  end
  oldest[#oldest + 1] = published
end
return {found, oldest}
"""

# KEYS unacked, queues
# Returns the publish time of the oldest message of each queue, and of the oldest in unacked; '' for
# none. Reads at most 256 messages of unacked, which stay there for minutes only.
AGES_SCRIPT: Final = """
local function published(message)
  return string.match(string.sub(message, -8192), 'published[\\\\"]+: ([%d.]+)') or ''
end
local ages, oldest = {}, ''
for i = 2, #KEYS do
  local message = redis.call('LINDEX', KEYS[i], -1)
  ages[#ages + 1] = message and published(message) or ''
end
local tags = redis.call('HKEYS', KEYS[1])
for i = 1, math.min(#tags, 256) do
  local at = published(redis.call('HGET', KEYS[1], tags[i]))
  if at ~= '' and (oldest == '' or tonumber(at) < tonumber(oldest)) then oldest = at end
end
ages[#ages + 1] = oldest
return ages
"""


@dataclass(frozen=True, slots=True)
class RedisMemory:
    """Memory use of a Redis.

    Attributes:
        used: bytes in use.
        limit: maxmemory in bytes, 0 for none.
    """

    used: int
    limit: int

    @property
    def ratio(self) -> float:
        """Used share of the limit; 0 without a limit."""
        return self.used / self.limit if self.limit else 0.0

    @classmethod
    def from_info(cls, info: object) -> RedisMemory:
        """Read the response to INFO; a refused INFO counts as no use."""
        if not isinstance(info, dict):
            return cls(0, 0)
        return cls(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))


class QueueInspector:
    """Reads the state of the broker."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._snapshot = redis.register_script(_SNAPSHOT)

    def snapshot(self, task_ids: Iterable[str], results: Redis) -> QueueSnapshot:
        """Return the state of the queues and of these tasks.

        Args:
            task_ids: tasks to find among the unacknowledged messages.
            results: Redis that holds heartbeats and the pause.
        """
        queues = [str(queue) for queue in Queue]
        found, oldest = cast(
            tuple[list[bytes], list[bytes]],
            self._snapshot(keys=[UNACKED_KEY, *queues], args=list(task_ids)),
        )
        probing = any(worker.state == "probing" for worker in list_live_workers(results))
        return QueueSnapshot(
            unacked=frozenset(task.decode() for task in found),
            oldest={
                queue: float(published) if published else None
                for queue, published in zip(queues, oldest, strict=True)
            },
            settled=not probing and not results.exists(PAUSED_KEY),
        )

    def memory(self) -> RedisMemory:
        """Return the memory use of this Redis; a refused INFO counts as no use."""
        try:
            return RedisMemory.from_info(self._redis.info("memory"))
        except ResponseError:
            return RedisMemory(0, 0)


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """State of the broker at one moment.

    Attributes:
        unacked: requested task ids that a worker received and has not acknowledged.
        oldest: queue -> Unix time at which its oldest message was published; None when empty.
        settled: no worker is probing and the fleet is not paused.
    """

    unacked: frozenset[str]
    oldest: Mapping[str, float | None]
    settled: bool
