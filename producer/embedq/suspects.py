"""Texts that a job's careful mode tries one by one, noted where no dying process takes them along.

One hash per job, beside its ledger. Each process has notes of its own, because a batch may run
twice at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, cast

from redis import Redis

#: Life of the notes, in seconds: longer than any batch takes text by text.
TTL_S: Final = 86_400

# KEYS meta suspects; ARGV verb name value ttl
# A job that was dropped meanwhile must not come back to life as notes.
_NOTE: Final = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
redis.call(ARGV[1], KEYS[2], ARGV[2], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[4])
return 1
"""


@dataclass(frozen=True, slots=True)
class Notes:
    """What is noted of a batch.

    Attributes:
        started: process -> offset of the text it has started and not ended.
        missed: the same, of starts that somebody has seen before.
        charges: offset -> points for failures.
    """

    started: dict[str, int] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)
    charges: dict[int, int] = field(default_factory=dict)


class Suspects:
    """The notes of one job."""

    def __init__(self, client: Redis, job: str) -> None:
        self._redis = client
        self._meta = f"embedq:{{{job}}}:meta"
        self._key = suspects_key(job)
        self._note = client.register_script(_NOTE)

    def start(self, index: int, offset: int, process: str) -> None:
        """Note that a process tries a text on its own."""
        self._write("HSET", f"{index}@{process}", offset)

    def end(self, index: int, offset: int, process: str, *, cleared: bool) -> None:
        """Note that the process is done with that text; a cleared one is charged with nothing."""
        fields = [f"{index}@{process}", f"{index}?{process}"]
        self._redis.hdel(self._key, *fields, *([f"{index}:{offset}"] if cleared else []))

    def miss(self, index: int, offset: int, process: str) -> None:
        """Note that we have seen a start without an end; its process may be dead, or at it."""
        self._redis.hdel(self._key, f"{index}@{process}")
        self._write("HSET", f"{index}?{process}", offset)

    def charge(self, index: int, offset: int, points: int) -> None:
        """Charge a text with a failure."""
        self._write("HINCRBY", f"{index}:{offset}", points)

    def fetch(self, index: int) -> Notes:
        """Return what is noted of a batch."""
        notes = Notes()
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
        self._note(keys=[self._meta, self._key], args=[verb, name, value, TTL_S])


def suspects_key(job: str) -> str:
    """Return the key of a job's notes."""
    return f"embedq:{{{job}}}:suspects"
