"""Reads a snapshot of workers, queues and jobs from both Redis.

A snapshot costs three round trips, however many workers and jobs there are.
A Redis user with read permissions is enough.
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
from embedq.protocol.worker import MAX_NUMBER, WorkerStatus, strip_control_chars
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
from embedq.store.ledger import JOBS_KEY, job_key
from embedq.store.queues import AGES_SCRIPT, UNACKED_INDEX_KEY, UNACKED_KEY, RedisMemory

#: Maximum number of jobs in a snapshot; the newest are read.
MAX_JOBS: Final = 1_000


@dataclass(frozen=True, slots=True)
class JobStatus:
    """State of one job whose ledger exists.

    Attributes:
        id: id of the job.
        label: path of the output; empty if the job has none.
        committed: number of committed batches.
        waiting: number of committed batches that the producer has not collected.
        age_s: seconds since the job was created.
        published: number of published batches; the producer reports it about once per second.
        texts: number of texts in committed batches; a recomputed batch counts again.
        planned_texts: number of texts of the whole job; None while the producer does not know.
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
    """Snapshot of the fleet.

    Attributes:
        at: Unix time of the snapshot, seconds.
        workers: workers with a heartbeat, by name.
        queues: queue -> number of ready messages.
        unacked: number of unacknowledged messages.
        oldest_lease_s: seconds since the oldest lease was renewed; 0 if there is none.
        jobs: jobs whose ledger exists, oldest first.
        memory: "broker" and "results" -> memory use of that Redis.
        paused: reason and start of the pause; None while the fleet is not paused.
        silent: worker -> Unix time of its last heartbeat, for workers whose heartbeat expired
            without deregistration.
        oldest_ready_s: queue -> seconds since its oldest message was published; 0 if it is empty.
        oldest_unacked_s: seconds since the oldest unacknowledged message was published; 0 if
            there is none.
        dead: number of dead letters.
    """

    at: float
    workers: list[WorkerStatus]
    queues: dict[str, int]
    unacked: int
    oldest_lease_s: float
    jobs: list[JobStatus]
    memory: dict[str, RedisMemory]
    paused: Pause | None
    silent: dict[str, float] = field(default_factory=dict)
    oldest_ready_s: dict[str, float] = field(default_factory=dict)
    oldest_unacked_s: float = 0.0
    dead: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the snapshot as an object for JSON."""
        shown = asdict(self)
        shown["paused"] = self.paused._asdict() if self.paused else None
        shown["redis"] = {name: round(load.ratio, 4) for name, load in self.memory.items()}
        return shown


def fetch_status(broker: Redis, results: Redis) -> FleetStatus:
    """Read a snapshot of the fleet.

    Raises:
        redis.exceptions.RedisError: a Redis does not answer.
    """
    now = time.time()
    names = [str(queue) for queue in Queue]
    *lengths, unacked, leases, ages, broker_info = _read_broker(broker, names)
    beats, job_index, paused, dead, results_info = _read_results(results, now)
    seen = {name.decode(errors="replace"): at for name, at in beats}
    workers, jobs = _read_workers_and_jobs(results, list(seen), job_index, now)
    live = {worker.worker for worker in workers}
    # A Redis that rejects scripts returns no ages.
    ages = [_age(now, at) for at in ages] if isinstance(ages, list) else [0.0] * (len(names) + 1)
    return FleetStatus(
        at=now,
        workers=workers,
        queues=dict(zip(names, map(int, lengths), strict=True)),
        unacked=int(unacked),
        oldest_lease_s=round(max(0.0, now - leases[0][1]), 1) if leases else 0.0,
        jobs=jobs,
        memory={
            "broker": RedisMemory.from_info(broker_info),
            "results": RedisMemory.from_info(results_info),
        },
        paused=read_pause(paused),
        silent={
            strip_control_chars(name): at
            for name, at in seen.items()
            if strip_control_chars(name) not in live
        },
        oldest_ready_s=dict(zip(names, ages, strict=False)),
        oldest_unacked_s=ages[-1],
        dead=int(dead),
    )


def _read_broker(broker: Redis, queues: list[str]) -> list[Any]:
    pipe = broker.pipeline(transaction=False)
    for queue in queues:
        pipe.llen(queue)
    pipe.hlen(UNACKED_KEY)
    pipe.zrange(UNACKED_INDEX_KEY, 0, 0, withscores=True)
    pipe.eval(AGES_SCRIPT, 1 + len(queues), UNACKED_KEY, *queues)
    pipe.info("memory")
    return _checked(pipe.execute(raise_on_error=False), optional=2)


def _read_results(results: Redis, now: float) -> list[Any]:
    pipe = results.pipeline(transaction=False)
    pipe.zrangebyscore(WORKERS_KEY, now - FORGET_S, "+inf", withscores=True)
    pipe.zrange(JOBS_KEY, 0, MAX_JOBS - 1, desc=True, withscores=True)
    pipe.get(PAUSED_KEY)
    pipe.hlen(DEAD_KEY)
    pipe.info("memory")
    return _checked(pipe.execute(raise_on_error=False), optional=1)


def _read_workers_and_jobs(
    results: Redis, names: Sequence[str], job_index: list[tuple[bytes, float]], now: float
) -> tuple[list[WorkerStatus], list[JobStatus]]:
    if not names and not job_index:
        return [], []
    pipe = results.pipeline(transaction=False)
    for name in names:
        pipe.get(worker_key(name))
    for job, _ in job_index:
        _queue_job_reads(pipe, job.decode(errors="replace"))
    answers = iter(_without_type_errors(pipe.execute(raise_on_error=False)))
    workers = decode_heartbeats([next(answers) for _ in names])
    jobs, expired = [], []
    for job, created in job_index:
        if (status := _decode_job(job, round(now - created, 1), answers)) is not None:
            jobs.append(status)
        else:
            expired.append(job)
    if expired:
        with suppress(ResponseError):  # a read-only user may not delete
            results.zrem(JOBS_KEY, *expired)
    return workers, jobs[::-1]


def _queue_job_reads(pipe: Pipeline, job: str) -> None:
    pipe.hmget(job_key(job, "meta"), ["label", "published", "texts", "planned"])
    pipe.bitcount(job_key(job, "bits"))
    pipe.xlen(job_key(job, "commits"))


def _decode_job(name: bytes, age_s: float, answers: Iterator[Any]) -> JobStatus | None:
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
        # Commits can be ahead of the producer's report.
        published=max(int(_number(published)), int(committed)),
        texts=int(_number(texts)),
        planned_texts=None if planned is None else int(_number(planned)),
    )


def _checked(answers: list[Any], *, optional: int) -> list[Any]:
    # The last `optional` commands need permissions that some Redis users lack.
    for answer in answers[:-optional]:
        if isinstance(answer, Exception):
            raise answer
    return answers


def _without_type_errors(answers: list[Any]) -> list[Any]:
    # A key of another type was written by another program: skip its worker or job only.
    for answer in answers:
        if isinstance(answer, Exception) and not str(answer).startswith("WRONGTYPE"):
            raise answer
    return answers


def _age(now: float, published: bytes) -> float:
    return round(max(0.0, now - float(published)), 1) if published else 0.0


def _number(raw: bytes | None) -> float:
    try:
        number = float(raw or 0)
    except ValueError:
        return 0.0
    return number if abs(number) <= MAX_NUMBER else 0.0
