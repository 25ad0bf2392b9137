"""Queue depth, unacknowledged messages and memory of Redis.

The broker seen from outside Celery: what waits, what a worker holds, how full it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, cast

from redis import Redis
from redis.exceptions import ResponseError

from embedq.protocol.contract import Queue
from embedq.store.fleet import PAUSED_KEY, list_live_workers

#: Hash of kombu's that holds every message popped and not acknowledged.
UNACKED_KEY: Final = "unacked"


#: Sorted set of kombu's: the same messages by the time their lease was last renewed.
UNACKED_INDEX_KEY: Final = "unacked_index"


# Which of the ids ARGV[1..] appear in unacked, and the publish time of the oldest message of each
# queue KEYS[2..]. Kombu writes a message as JSON with the headers behind the body, so the last
# kilobytes tell, and texts are not searched.
_LOOK: Final = """
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


# The publish times of the oldest message of each queue KEYS[2..], and of the oldest in KEYS[1]; ''
# where there is none. Of many in hand only some are looked at: they are there for minutes at most.
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
    """How full a Redis is.

    Attributes:
        used: bytes in use.
        limit: maxmemory in bytes, 0 for none.
    """

    used: int
    limit: int

    @property
    def ratio(self) -> float:
        """Share in use; 0 where there is no limit."""
        return self.used / self.limit if self.limit else 0.0

    @classmethod
    def from_info(cls, info: object) -> RedisMemory:
        """Read the answer to INFO; a Redis that refuses it counts as empty."""
        if not isinstance(info, dict):
            return cls(0, 0)
        return cls(int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))


class QueueInspector:
    """The queues as Redis holds them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._look = redis.register_script(_LOOK)

    def snapshot(self, task_ids: Iterable[str], results: Redis) -> QueueSnapshot:
        """Return what the reconciler needs to know of these tasks.

        Args:
            task_ids: outstanding tasks.
            results: where the fleet tells how it is.
        """
        queues = [str(queue) for queue in Queue]
        answer = cast(
            tuple[list[bytes], list[bytes]],
            self._look(keys=[UNACKED_KEY, *queues], args=list(task_ids)),
        )
        found, oldest = answer
        probing = any(worker.state == "probing" for worker in list_live_workers(results))
        return QueueSnapshot(
            in_hand=frozenset(task.decode() for task in found),
            oldest={
                queue: float(published) if published else None
                for queue, published in zip(queues, oldest, strict=True)
            },
            settled=not probing and not results.exists(PAUSED_KEY),
        )

    def memory(self) -> RedisMemory:
        """Return how full this Redis is; one that does not tell counts as empty."""
        try:
            return RedisMemory.from_info(self._redis.info("memory"))
        except ResponseError:
            return RedisMemory(0, 0)


@dataclass(frozen=True, slots=True)
class QueueSnapshot:
    """What Redis holds at one moment.

    Attributes:
        in_hand: ids of the tasks that some worker has popped and not acknowledged.
        oldest: queue -> Unix time at which its oldest message was published; None when empty.
        settled: no worker is probing and nobody has paused the queues.
    """

    in_hand: frozenset[str]
    oldest: Mapping[str, float | None]
    settled: bool
