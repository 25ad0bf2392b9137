"""Snapshot of workers, queues and jobs.

How far a job is, as it stands beside its ledger for whoever looks from outside.

What the fleet looks like at this moment: workers, queues and jobs, from Redis alone.

Costs three round trips however many workers and jobs there are, and a user of Redis who may only
read can look too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from redis import Redis
from redis.client import Pipeline
from redis.exceptions import ResponseError

from embedq.protocol.contract import Queue
from embedq.protocol.worker import LARGEST, WorkerStatus, strip_control_chars
from embedq.store.dead_letters import DEAD_KEY
from embedq.store.fleet import (
    FORGET_S,
    PAUSED_KEY,
    WORKERS_KEY,
    Pause,
    decode_heartbeats,
    read_pause,
    worker_key,
)
from embedq.store.ledger import JOBS_KEY
from embedq.store.queues import AGES_SCRIPT, UNACKED_INDEX_KEY, UNACKED_KEY, RedisMemory

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


def report_progress(redis: Redis, job: str, *, published: int, planned: int | None) -> None:
    """Write down what only the producer knows."""
    told: list[str | int] = ["published", published]
    if planned is not None:
        told += ["planned", planned]
    redis.eval(_TELL, 1, _key(job, "meta"), *told)


def queue_reads(pipe: Pipeline, job: str) -> None:
    """Add the questions about a job to a pipeline."""
    pipe.hmget(_key(job, "meta"), list(_FIELDS))
    pipe.bitcount(_key(job, "bits"))
    pipe.xlen(_key(job, "commits"))


def decode(answers: Iterator[Any]) -> Progress | None:
    """Take the answers about a job from those of a pipeline; None if the job is gone."""
    told, committed, untaken = next(answers), next(answers), next(answers)
    if any(isinstance(answer, Exception) for answer in (told, committed, untaken)):
        return None  # its keys hold something else
    label, created, published, texts, planned = told
    if label is None:
        return None
    return Progress(
        label=strip_control_chars(label.decode(errors="replace")),
        created=_number(created),
        # Of a producer of another version we know only what its workers have committed.
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


#: Most jobs that are looked at, newest first; abandoned ones linger here until the next one opens.
MOST_JOBS: Final = 1_000


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One living job.

    Attributes:
        id, label: of the job; the label is the output it is written to, if it has one.
        committed: batches that have their vectors.
        waiting: of those, how many the producer has not taken yet.
        age_s: since it began.
        published: batches that were published.
        texts: texts that have their outcome.
        planned_texts: texts of the whole job; None while its producer does not know.
    """

    id: str
    label: str
    committed: int
    waiting: int
    age_s: float
    published: int = 0
    texts: int = 0
    planned_texts: int | None = None


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """All of it.

    Attributes:
        at: Unix time of this look, in seconds.
        workers: the living ones, by name.
        queues: messages that wait in each queue.
        in_hand: messages that workers hold.
        oldest_lease_s: age of the oldest lease among them.
        jobs: the living ones, oldest first.
        redis: used share of the memory of broker and results; 0 where there is no limit.
        paused: why and since when an operator has paused the fleet; None while it works.
        silent: name -> Unix time of the last heartbeat of workers that went without taking leave.
        oldest_ready_s: time since the oldest message of each queue was published; 0 when empty.
        oldest_in_hand_s: the same for what workers hold.
        memory: of broker and results.
        dead: texts set aside.
    """

    at: float
    workers: list[WorkerStatus]
    queues: dict[str, int]
    in_hand: int
    oldest_lease_s: float
    jobs: list[JobStatus]
    redis: dict[str, float]
    paused: Pause | None
    silent: dict[str, float] = field(default_factory=dict)
    oldest_ready_s: dict[str, float] = field(default_factory=dict)
    oldest_in_hand_s: float = 0.0
    memory: dict[str, RedisMemory] = field(default_factory=dict)
    dead: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the status for JSON."""
        shown = asdict(self)
        shown["paused"] = self.paused._asdict() if self.paused else None
        return shown


def fetch_status(broker: Redis, results: Redis) -> FleetStatus:
    """Look at everything once.

    Raises:
        redis.exceptions.RedisError: a Redis does not answer.
    """
    now = time.time()
    names = [str(queue) for queue in Queue]
    *lengths, in_hand, leases, ages, carrying = _ask_broker(broker, names)
    beats, known, paused, dead, holding = _ask_results(results, now)
    seen = {name.decode(errors="replace"): at for name, at in beats}
    alive, jobs = _ask_details(results, list(seen), known, now)
    living = {worker.worker for worker in alive}
    memory = {"broker": RedisMemory.from_info(carrying), "results": RedisMemory.from_info(holding)}
    # A Redis that refuses scripts tells no ages.
    ages = [_age(now, at) for at in ages] if isinstance(ages, list) else [0.0] * (len(names) + 1)
    return FleetStatus(
        at=now,
        workers=alive,
        queues=dict(zip(names, map(int, lengths), strict=True)),
        in_hand=int(in_hand),
        oldest_lease_s=round(max(0.0, now - leases[0][1]), 1) if leases else 0.0,
        jobs=jobs,
        redis={name: round(load.ratio, 4) for name, load in memory.items()},
        paused=read_pause(paused),
        silent={
            strip_control_chars(name): at
            for name, at in seen.items()
            if strip_control_chars(name) not in living
        },
        oldest_ready_s=dict(zip(names, ages, strict=False)),
        oldest_in_hand_s=ages[-1],
        memory=memory,
        dead=int(dead),
    )


def _ask_broker(broker: Redis, queues: list[str]) -> list[Any]:
    pipe = broker.pipeline(transaction=False)
    for queue in queues:
        pipe.llen(queue)
    pipe.hlen(UNACKED_KEY)
    pipe.zrange(UNACKED_INDEX_KEY, 0, 0, withscores=True)
    pipe.eval(AGES_SCRIPT, 1 + len(queues), UNACKED_KEY, *queues)
    pipe.info("memory")
    return _checked(pipe.execute(raise_on_error=False), optional=2)


def _ask_results(results: Redis, now: float) -> list[Any]:
    pipe = results.pipeline(transaction=False)
    pipe.zrangebyscore(WORKERS_KEY, now - FORGET_S, "+inf", withscores=True)
    pipe.zrange(JOBS_KEY, 0, MOST_JOBS - 1, desc=True, withscores=True)
    pipe.get(PAUSED_KEY)
    pipe.hlen(DEAD_KEY)
    pipe.info("memory")
    return _checked(pipe.execute(raise_on_error=False), optional=1)


def _ask_details(
    results: Redis, names: Sequence[str], known: list[tuple[bytes, float]], now: float
) -> tuple[list[WorkerStatus], list[JobStatus]]:
    """Return the living workers, and the living jobs, oldest first."""
    if not names and not known:
        return [], []
    pipe = results.pipeline(transaction=False)
    for name in names:
        pipe.get(worker_key(name))
    for job, _ in known:
        queue_reads(pipe, job.decode(errors="replace"))
    answers = iter(_but_types(pipe.execute(raise_on_error=False)))
    alive = decode_heartbeats([next(answers) for _ in names])
    jobs, faded = [], []
    for job, began in known:
        if (found := decode(answers)) is not None:
            name = strip_control_chars(job.decode(errors="replace"))
            jobs.append(_job(name, found, round(now - began, 1)))
        else:
            faded.append(job)
    if faded:  # abandoned jobs
        with suppress(ResponseError):  # whoever may only read leaves that to others
            results.zrem(JOBS_KEY, *faded)
    return alive, jobs[::-1]


def _job(name: str, found: Progress, age_s: float) -> JobStatus:
    return JobStatus(
        id=name,
        label=found.label,
        committed=found.committed,
        waiting=found.untaken,
        age_s=age_s,
        published=found.published,
        texts=found.texts,
        planned_texts=found.planned,
    )


def _checked(answers: list[Any], *, optional: int) -> list[Any]:
    """Raise what Redis refused, but for the last questions, which some refuse to some users."""
    for answer in answers[:-optional]:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _but_types(answers: list[Any]) -> list[Any]:
    """Raise what Redis refused, but for keys that hold something else than ours do."""
    for answer in answers:
        if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
            raise answer
    return answers


def _age(now: float, published: bytes) -> float:
    return round(max(0.0, now - float(published)), 1) if published else 0.0
