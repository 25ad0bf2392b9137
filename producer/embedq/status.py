"""What the fleet looks like at this moment: nodes, queues and jobs, from Redis alone."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, cast

from redis import Redis

from embedq.broker import Broker
from embedq.fleet import Heartbeat, fetch_alive
from embedq.ledger import JOBS_KEY, Ledger
from embedq.orders import Pause, fetch_pause


@dataclass(frozen=True, slots=True)
class JobStatus:
    """One living job.

    Attributes:
        id, label: of the job; the label is the output it is written to, if it has one.
        committed: batches that have their vectors.
        waiting: of those, how many the producer has not taken yet.
        age_s: since it began.
    """

    id: str
    label: str
    committed: int
    waiting: int
    age_s: float


@dataclass(frozen=True, slots=True)
class FleetStatus:
    """All of it.

    Attributes:
        at: Unix time of this look, in seconds.
        nodes: the living ones, by name.
        queues: messages that wait in each queue.
        in_hand: messages that nodes hold.
        oldest_lease_s: age of the oldest lease among them.
        jobs: the living ones, oldest first.
        redis: used share of the memory of broker and results; 0 where there is no limit.
        paused: why and since when an operator has paused the fleet; None while it works.
    """

    at: float
    nodes: list[Heartbeat]
    queues: dict[str, int]
    in_hand: int
    oldest_lease_s: float
    jobs: list[JobStatus]
    redis: dict[str, float]
    paused: Pause | None

    def as_dict(self) -> dict[str, Any]:
        """Return the status for JSON."""
        shown = asdict(self)
        shown["paused"] = self.paused._asdict() if self.paused else None
        return shown


def fetch_status(broker: Redis, results: Redis) -> FleetStatus:
    """Look at everything once; costs a handful of commands, and two for each job.

    Raises:
        redis.exceptions.RedisError: a Redis does not answer.
    """
    queues = Broker(broker)
    in_hand, oldest_lease_s = queues.in_hand()
    return FleetStatus(
        at=time.time(),
        nodes=fetch_alive(results),
        queues=queues.depths(),
        in_hand=in_hand,
        oldest_lease_s=round(oldest_lease_s, 1),
        jobs=_jobs(results),
        redis={
            "broker": round(queues.load().ratio, 4),
            "results": round(Broker(results).load().ratio, 4),
        },
        paused=fetch_pause(results),
    )


def _jobs(results: Redis) -> list[JobStatus]:
    known = cast(list[tuple[bytes, float]], results.zrange(JOBS_KEY, 0, -1, withscores=True))
    jobs = []
    for name, began in known:
        job = name.decode()
        found = Ledger(results, job).progress()
        if found is None:  # its keys faded: an abandoned job
            results.zrem(JOBS_KEY, job)
            continue
        jobs.append(JobStatus(job, *found, age_s=round(time.time() - began, 1)))
    return jobs
