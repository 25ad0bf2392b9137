"""Values written ahead of their commit, so that a large batch is committed in a moment.

A worker writes the vectors that it has while it still computes others, under keys of its own
execution; the commit renames them into place. Nobody reads them before that. They fade by
themselves, and go with the job.
"""

from __future__ import annotations

import secrets
from typing import Final

from redis import Redis

#: Life of a value that nobody commits, in seconds; a commit that comes later sends it again.
STAGED_TTL_S: Final = 300


def staged_key(job: str) -> str:
    """Return the key of the set that names what is staged of a job."""
    return f"embedq:{{{job}}}:staged"


class Staging:
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
