"""How far a job is, as it stands beside its ledger for whoever looks from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from redis import Redis
from redis.client import Pipeline

from embedq.records import LARGEST, plain

# KEYS meta; ARGV name value... A job that is gone stays gone: a key written now would have no end.
_TELL: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then redis.call('HSET', KEYS[1], unpack(ARGV)) end
"""
_FIELDS: Final = ("label", "created", "published", "texts", "planned")


@dataclass(frozen=True, slots=True)
class Progress:
    """One living job, as Redis knows it.

    Attributes:
        label: the output it is written to, if it has one.
        created: Unix time of its start, in seconds.
        published: batches sent so far, told about every second.
        committed: batches that have their vectors.
        untaken: of those, how many the producer has not taken yet.
        texts: texts that have their outcome; a batch computed again counts again.
        planned: texts of the whole job; None while its producer does not know.
    """

    label: str
    created: float
    published: int
    committed: int
    untaken: int
    texts: int
    planned: int | None


def tell(redis: Redis, job: str, *, published: int, planned: int | None) -> None:
    """Write down what only the producer knows."""
    told: list[str | int] = ["published", published]
    if planned is not None:
        told += ["planned", planned]
    redis.eval(_TELL, 1, _key(job, "meta"), *told)


def ask(pipe: Pipeline, job: str) -> None:
    """Add the questions about a job to a pipeline."""
    pipe.hmget(_key(job, "meta"), list(_FIELDS))
    pipe.bitcount(_key(job, "bits"))
    pipe.xlen(_key(job, "commits"))


def read(answers: Iterator[Any]) -> Progress | None:
    """Take the answers about a job from those of a pipeline; None if the job is gone."""
    told, committed, untaken = next(answers), next(answers), next(answers)
    if any(isinstance(answer, Exception) for answer in (told, committed, untaken)):
        return None  # its keys hold something else
    label, created, published, texts, planned = told
    if label is None:
        return None
    return Progress(
        label=plain(label.decode(errors="replace")),
        created=_number(created),
        # Of a producer of another version we know only what its nodes have committed.
        published=max(int(_number(published)), int(committed)),
        committed=int(committed),
        untaken=int(untaken),
        texts=int(_number(texts)),
        planned=None if planned is None else int(_number(planned)),
    )


def _number(told: bytes | None) -> float:
    """Return a number of the hash; 0 for none, and for what is none."""
    try:
        number = float(told or 0)
    except ValueError:
        return 0.0
    return number if abs(number) <= LARGEST else 0.0


def _key(job: str, name: str) -> str:
    return f"embedq:{{{job}}}:{name}"
