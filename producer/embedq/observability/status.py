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
        memory: of broker and results.
        paused: why and since when an operator has paused the fleet; None while it works.
        silent: name -> Unix time of the last heartbeat of workers that went without taking leave.
        oldest_ready_s: time since the oldest message of each queue was published; 0 when empty.
        oldest_in_hand_s: the same for what workers hold.
        dead: texts set aside.
    """

    at: float
    workers: list[WorkerStatus]
    queues: dict[str, int]
    in_hand: int
    oldest_lease_s: float
    jobs: list[JobStatus]
    memory: dict[str, RedisMemory]
    paused: Pause | None
    silent: dict[str, float] = field(default_factory=dict)
    oldest_ready_s: dict[str, float] = field(default_factory=dict)
    oldest_in_hand_s: float = 0.0
    dead: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the status for JSON."""
        shown = asdict(self)
        shown["paused"] = self.paused._asdict() if self.paused else None
        shown["redis"] = {name: round(load.ratio, 4) for name, load in self.memory.items()}
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
        memory=memory,
        paused=read_pause(paused),
        silent={
            strip_control_chars(name): at
            for name, at in seen.items()
            if strip_control_chars(name) not in living
        },
        oldest_ready_s=dict(zip(names, ages, strict=False)),
        oldest_in_hand_s=ages[-1],
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
        _queue_job_reads(pipe, job.decode(errors="replace"))
    answers = iter(_but_types(pipe.execute(raise_on_error=False)))
    alive = decode_heartbeats([next(answers) for _ in names])
    jobs, faded = [], []
    for job, began in known:
        if (found := _decode_job(job, round(now - began, 1), answers)) is not None:
            jobs.append(found)
        else:
            faded.append(job)
    if faded:  # abandoned jobs
        with suppress(ResponseError):  # whoever may only read leaves that to others
            results.zrem(JOBS_KEY, *faded)
    return alive, jobs[::-1]


def _queue_job_reads(pipe: Pipeline, job: str) -> None:
    pipe.hmget(_key(job, "meta"), ["label", "published", "texts", "planned"])
    pipe.bitcount(_key(job, "bits"))
    pipe.xlen(_key(job, "commits"))


def _decode_job(name: bytes, age_s: float, answers: Iterator[Any]) -> JobStatus | None:
    """Decode the next three answers; None if the job is gone."""
    meta, committed, waiting = next(answers), next(answers), next(answers)
    if any(isinstance(answer, Exception) for answer in (meta, committed, waiting)):
        return None  # another program wrote these keys
    label, published, texts, planned = meta
    if label is None:
        return None
    return JobStatus(
        id=strip_control_chars(name.decode(errors="replace")),
        label=strip_control_chars(label.decode(errors="replace")),
        committed=int(committed),
        waiting=int(waiting),
        age_s=age_s,
        # The producer reports about once per second, so commits may be ahead of it.
        published=max(int(_number(published)), int(committed)),
        texts=int(_number(texts)),
        planned_texts=None if planned is None else int(_number(planned)),
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


def _number(raw: bytes | None) -> float:
    """Return a number of the job's hash; 0 if it is missing or not a number in range."""
    try:
        number = float(raw or 0)
    except ValueError:
        return 0.0
    return number if abs(number) <= LARGEST else 0.0


def _key(job: str, name: str) -> str:
    return f"embedq:{{{job}}}:{name}"
