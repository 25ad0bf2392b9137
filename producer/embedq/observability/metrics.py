"""Metric definitions and samples; pure.

Every metric that embedq exposes: name, kind, labels and meaning. No client library enters here.

Labels are bounded: queues and states are lists of ours, reasons are codes, and of workers and jobs
there are at most as many as the limits below say.

A look at the fleet as samples of metrics. Pure: no client library, no Redis, no clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from embedq.observability.status import FleetStatus, JobStatus
from embedq.protocol.worker import WorkerStatus

#: Most workers that have series of their own, by name; all of them are counted in embedq_workers.
MOST_WORKERS: Final = 256


#: Most jobs that have series of their own, newest first; the others are summed as OTHER_JOBS.
MOST_JOBS: Final = 20


#: Value of the label `job` for all others.
OTHER_JOBS: Final = "others"


#: Values of the label `state`; a worker that is silent has no heartbeat and did not take leave.
STATES: Final = ("starting", "healthy", "degraded", "probing", "failed")


SILENT: Final = "silent"


#: Value of the label `reason` of a worker that is as it should be, and of one with an unknown code.
NO_REASON, OTHER_REASON = "none", "other"


class Kind(StrEnum):
    """Kinds of Prometheus."""

    GAUGE = "gauge"
    COUNTER = "counter"
    SUMMARY = "summary"


class Metric(NamedTuple):
    """One family of series.

    Attributes:
        name: in base units; a counter ends in _total, a summary gets _sum and _count.
        kind: of Prometheus.
        labels: their names.
        help: one sentence.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


_G, _C, _S = Kind.GAUGE, Kind.COUNTER, Kind.SUMMARY


METRICS: Final = (
    Metric("embedq_up", _G, (), "1 if both Redis answered this scrape; else most others are gone."),
    Metric("embedq_redis_up", _G, ("instance",), "1 if this Redis (broker or results) answered."),
    Metric("embedq_scrape_duration_seconds", _G, (), "Time that this scrape took to collect."),
    Metric("embedq_paused", _G, (), "1 while an operator has paused the fleet."),
    Metric("embedq_redis_memory_used_bytes", _G, ("instance",), "Memory that a Redis uses."),
    Metric("embedq_redis_memory_limit_bytes", _G, ("instance",), "Its maxmemory; 0 for none."),
    Metric("embedq_redis_memory_used_ratio", _G, ("instance",), "Used share of it; 0 for none."),
    Metric("embedq_queue_ready_messages", _G, ("queue",), "Batches that wait in a queue."),
    Metric(
        "embedq_queue_oldest_ready_age_seconds",
        _G,
        ("queue",),
        "Time since the oldest batch of a queue was published; 0 when it is empty.",
    ),
    Metric("embedq_unacked_messages", _G, (), "Batches that workers hold."),
    Metric(
        "embedq_unacked_oldest_age_seconds",
        _G,
        (),
        "Time since the oldest batch that a worker holds was published; 0 when there is none.",
    ),
    Metric(
        "embedq_unacked_oldest_lease_age_seconds",
        _G,
        (),
        "Time since the oldest lease was renewed; beyond the visibility timeout its worker is "
        "dead.",
    ),
    Metric("embedq_dead_letters", _G, (), "Texts set aside and kept (embedq dead ls)."),
    Metric("embedq_workers", _G, ("state",), "Workers in each state, or silent."),
    Metric(
        "embedq_worker_up", _G, ("worker",), "1 if the worker beat lately, 0 if it fell silent."
    ),
    Metric(
        "embedq_worker_last_beat_timestamp_seconds",
        _G,
        ("worker",),
        "Unix time of the last heartbeat.",
    ),
    Metric(
        "embedq_worker_info",
        _G,
        ("worker", "assigned_device", "device", "engine", "precision", "model"),
        "1; what a worker is for (home) and what computes there now.",
    ),
    Metric(
        "embedq_worker_state",
        _G,
        ("worker", "state"),
        "1 for the state that a worker is in, else 0.",
    ),
    Metric(
        "embedq_worker_reason",
        _G,
        ("worker", "reason"),
        "1 for the code of why a worker is not healthy, or none; embedq status has the sentence.",
    ),
    Metric(
        "embedq_worker_state_since_timestamp_seconds",
        _G,
        ("worker",),
        "Unix time of a worker's last change of state.",
    ),
    Metric("embedq_worker_batches_total", _C, ("worker",), "Batches computed."),
    Metric("embedq_worker_texts_total", _C, ("worker",), "Texts computed."),
    Metric("embedq_worker_tokens_total", _C, ("worker",), "Tokens of these texts."),
    Metric(
        "embedq_worker_computed_tokens_total",
        _C,
        ("worker",),
        "The same with padding; tokens divided by this is how full rows are packed.",
    ),
    Metric("embedq_worker_busy_seconds_total", _C, ("worker",), "Time with a batch in hand."),
    Metric(
        "embedq_worker_infer_seconds",
        _S,
        ("worker",),
        "Time of inferences on the device, and how many; they may overlap.",
    ),
    Metric("embedq_worker_rerouted_total", _C, ("worker",), "Batches handed to another queue."),
    Metric(
        "embedq_worker_redelivered_total",
        _C,
        ("worker",),
        "Batches begun that somebody had begun before.",
    ),
    Metric(
        "embedq_worker_duplicates_total",
        _C,
        ("worker",),
        "Batches computed in vain: the ledger had them already.",
    ),
    Metric("embedq_worker_refused_total", _C, ("worker",), "Batches answered as failed."),
    Metric("embedq_worker_set_aside_total", _C, ("worker",), "Texts that no process survived."),
    Metric("embedq_jobs", _G, (), "Living jobs."),
    Metric("embedq_job_created_timestamp_seconds", _G, ("job",), "Unix time of a job's start."),
    Metric("embedq_job_published_batches", _G, ("job",), "Batches published so far."),
    Metric("embedq_job_committed_batches", _G, ("job",), "Batches that have their vectors."),
    Metric(
        "embedq_job_untaken_batches",
        _G,
        ("job",),
        "Of these, how many the producer has not taken yet.",
    ),
    Metric("embedq_job_committed_texts", _G, ("job",), "Texts that have their outcome."),
    Metric(
        "embedq_job_planned_texts",
        _G,
        ("job",),
        "Texts of the whole job; no series where the producer does not know.",
    ),
)


BY_NAME: Final = {metric.name: metric for metric in METRICS}


def table() -> str:
    """Return all metrics as the table of README."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines)


#: What workers count -> the metric it is.
TOTALS: Final = {
    "batches": "embedq_worker_batches_total",
    "texts": "embedq_worker_texts_total",
    "tokens": "embedq_worker_tokens_total",
    "computed_tokens": "embedq_worker_computed_tokens_total",
    "busy_s": "embedq_worker_busy_seconds_total",
    "rerouted": "embedq_worker_rerouted_total",
    "redelivered": "embedq_worker_redelivered_total",
    "duplicates": "embedq_worker_duplicates_total",
    "refused": "embedq_worker_refused_total",
    "set_aside": "embedq_worker_set_aside_total",
}


#: Longest code of a reason; a longer one, or one with spaces, is no code.
_LONGEST_CODE: Final = 40


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a metric.

    Attributes:
        name: of the metric.
        labels: their values, in the order of the metric.
        value: the number; of a summary, the sum.
        count: of a summary.
    """

    name: str
    labels: tuple[str, ...]
    value: float
    count: float = 0.0


def fleet_samples(found: FleetStatus) -> Iterator[Sample]:
    """Yield all samples of a look at the fleet."""
    yield Sample("embedq_paused", (), float(found.paused is not None))
    for instance, load in found.memory.items():
        yield Sample("embedq_redis_memory_used_bytes", (instance,), load.used)
        yield Sample("embedq_redis_memory_limit_bytes", (instance,), load.limit)
        yield Sample("embedq_redis_memory_used_ratio", (instance,), load.ratio)
    for queue, ready in found.queues.items():
        yield Sample("embedq_queue_ready_messages", (queue,), ready)
        age_s = found.oldest_ready_s.get(queue, 0.0)
        yield Sample("embedq_queue_oldest_ready_age_seconds", (queue,), age_s)
    yield Sample("embedq_unacked_messages", (), found.in_hand)
    yield Sample("embedq_unacked_oldest_age_seconds", (), found.oldest_in_hand_s)
    yield Sample("embedq_unacked_oldest_lease_age_seconds", (), found.oldest_lease_s)
    yield Sample("embedq_dead_letters", (), found.dead)
    yield from _of_workers(found)
    yield from _of_jobs(found.jobs, found.at)


def _of_workers(found: FleetStatus) -> Iterator[Sample]:
    states = Counter(str(worker.state) for worker in found.workers)
    for state in STATES:
        yield Sample("embedq_workers", (state,), states[state])
    yield Sample("embedq_workers", (SILENT,), len(found.silent))
    for worker in found.workers[:MOST_WORKERS]:
        yield Sample("embedq_worker_up", (worker.worker,), 1)
        yield Sample("embedq_worker_last_beat_timestamp_seconds", (worker.worker,), worker.at)
        yield from _of_worker(worker)
    for name, at in sorted(found.silent.items())[:MOST_WORKERS]:
        yield Sample("embedq_worker_up", (name,), 0)
        yield Sample("embedq_worker_last_beat_timestamp_seconds", (name,), at)


def _of_worker(worker: WorkerStatus) -> Iterator[Sample]:
    name = (worker.worker,)
    model = worker.model_info.label if worker.model_info else ""
    info = (*name, worker.assigned_device, worker.device, worker.engine, worker.precision, model)
    yield Sample("embedq_worker_info", info, 1)
    for state in STATES:
        yield Sample("embedq_worker_state", (*name, state), float(worker.state == state))
    yield Sample("embedq_worker_reason", (*name, _code(worker)), 1)
    yield Sample("embedq_worker_state_since_timestamp_seconds", name, worker.state_since)
    totals = worker.totals
    for key, metric in TOTALS.items():
        yield Sample(metric, name, float(totals.get(key, 0)))
    seconds, count = float(totals.get("infer_s", 0)), float(totals.get("inferences", 0))
    yield Sample("embedq_worker_infer_seconds", name, seconds, count)


def _code(worker: WorkerStatus) -> str:
    if worker.code and len(worker.code) <= _LONGEST_CODE and worker.code.isidentifier():
        return worker.code
    return OTHER_REASON if worker.reason else NO_REASON


def _of_jobs(jobs: list[JobStatus], now: float) -> Iterator[Sample]:
    """Yield the newest jobs one by one, and all others as one."""
    yield Sample("embedq_jobs", (), len(jobs))
    shown, rest = jobs[-MOST_JOBS:], jobs[:-MOST_JOBS]
    for job in shown:
        yield from _of_job(job.id, [job], now)
    if rest:
        yield from _of_job(OTHER_JOBS, rest, now)


def _of_job(name: str, jobs: Iterable[JobStatus], now: float) -> Iterator[Sample]:
    jobs = list(jobs)
    oldest_s = max(job.age_s for job in jobs)
    yield Sample("embedq_job_created_timestamp_seconds", (name,), now - oldest_s)
    sums = {
        "embedq_job_published_batches": sum(job.published for job in jobs),
        "embedq_job_committed_batches": sum(job.committed for job in jobs),
        "embedq_job_untaken_batches": sum(job.waiting for job in jobs),
        "embedq_job_committed_texts": sum(job.texts for job in jobs),
    }
    for metric, value in sums.items():
        yield Sample(metric, (name,), value)
    planned = [job.planned_texts for job in jobs if job.planned_texts is not None]
    if len(planned) == len(jobs):
        yield Sample("embedq_job_planned_texts", (name,), sum(planned))
