"""Defines every metric and turns a fleet snapshot into samples.

Pure: no Prometheus library, no Redis, no clock.
Label values are bounded: queues, states and reasons are fixed codes, and the number of workers and
jobs with series of their own is limited.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from embedq.observability.status import FleetStatus, JobStatus
from embedq.protocol.worker import WorkerState, WorkerStatus

#: Maximum number of workers with series of their own, by name; embedq_workers counts all workers.
MAX_WORKER_SERIES: Final = 256

#: Maximum number of jobs with series of their own, newest first; the others are summed.
MAX_JOB_SERIES: Final = 20

#: Value of the label `job` for the sum of all jobs without series of their own.
OTHER_JOBS: Final = "others"

#: Values of the label `state` for workers with a heartbeat.
STATES: Final = tuple(map(str, WorkerState))

#: Value of the label `state` for workers whose heartbeat expired without deregistration.
SILENT: Final = "silent"

#: Values of the label `reason` for a worker without a reason, and for one with an unknown code.
NO_REASON, OTHER_REASON = "none", "other"


class Kind(StrEnum):
    """Metric type in Prometheus."""

    GAUGE = "gauge"
    COUNTER = "counter"
    SUMMARY = "summary"


class Metric(NamedTuple):
    """Definition of one metric family.

    Attributes:
        name: name in base units; a counter ends in _total, a summary gets _sum and _count.
        kind: Prometheus type.
        labels: label names.
        help: one sentence.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


_G, _C, _S = Kind.GAUGE, Kind.COUNTER, Kind.SUMMARY

METRICS: Final = (
    Metric("embedq_up", _G, (), "1 if the fleet could be read; if 0, most metrics are missing."),
    Metric(
        "embedq_redis_up", _G, ("instance",), "1 if the Redis (broker or results) is reachable."
    ),
    Metric("embedq_scrape_duration_seconds", _G, (), "Duration of this scrape."),
    Metric("embedq_paused", _G, (), "1 while the fleet is paused by an operator."),
    Metric("embedq_redis_memory_used_bytes", _G, ("instance",), "Memory used by the Redis."),
    Metric(
        "embedq_redis_memory_limit_bytes",
        _G,
        ("instance",),
        "Memory limit (maxmemory) of the Redis; 0 without a limit.",
    ),
    Metric(
        "embedq_redis_memory_used_ratio",
        _G,
        ("instance",),
        "Used share of the memory limit of the Redis; 0 without a limit.",
    ),
    Metric("embedq_queue_ready_messages", _G, ("queue",), "Batches waiting in the queue."),
    Metric(
        "embedq_queue_oldest_ready_age_seconds",
        _G,
        ("queue",),
        "Time since the oldest batch in the queue was published; 0 if the queue is empty.",
    ),
    Metric("embedq_unacked_messages", _G, (), "Batches received by workers and not acknowledged."),
    Metric(
        "embedq_unacked_oldest_age_seconds",
        _G,
        (),
        "Time since the oldest unacknowledged batch was published; 0 without one.",
    ),
    Metric(
        "embedq_unacked_oldest_lease_age_seconds",
        _G,
        (),
        "Time since the oldest lease was renewed; longer than the visibility timeout means that "
        "its worker is dead.",
    ),
    Metric(
        "embedq_dead_letters",
        _G,
        (),
        "Dead letters: texts that no process survived (embedq dead ls).",
    ),
    Metric("embedq_workers", _G, ("state",), "Workers in the state; silent: heartbeat expired."),
    Metric("embedq_worker_up", _G, ("worker",), "1 with a heartbeat, 0 after it expired."),
    Metric(
        "embedq_worker_last_beat_timestamp_seconds",
        _G,
        ("worker",),
        "Unix time of the last heartbeat of the worker.",
    ),
    Metric(
        "embedq_worker_info",
        _G,
        ("worker", "assigned_device", "device", "engine", "precision", "model"),
        "1; the labels are the device assigned to the worker, and what computes now.",
    ),
    Metric(
        "embedq_worker_state",
        _G,
        ("worker", "state"),
        "1 for the current state of the worker, 0 for every other state.",
    ),
    Metric(
        "embedq_worker_reason",
        _G,
        ("worker", "reason"),
        "1 for the code of the reason why the worker is not healthy, or for none; embedq status "
        "prints the full reason.",
    ),
    Metric(
        "embedq_worker_state_since_timestamp_seconds",
        _G,
        ("worker",),
        "Unix time of the last state change of the worker.",
    ),
    Metric("embedq_worker_batches_total", _C, ("worker",), "Batches that the worker computed."),
    Metric("embedq_worker_texts_total", _C, ("worker",), "Texts that the worker computed."),
    Metric("embedq_worker_tokens_total", _C, ("worker",), "Tokens of the computed texts."),
    Metric(
        "embedq_worker_computed_tokens_total",
        _C,
        ("worker",),
        "Computed tokens including padding; embedq_worker_tokens_total divided by this is the "
        "packing efficiency.",
    ),
    Metric("embedq_worker_busy_seconds_total", _C, ("worker",), "Time spent on batches."),
    Metric(
        "embedq_worker_infer_seconds",
        _S,
        ("worker",),
        "Duration and number of inferences on the device; inferences can overlap.",
    ),
    Metric("embedq_worker_rerouted_total", _C, ("worker",), "Batches moved to another queue."),
    Metric(
        "embedq_worker_redelivered_total",
        _C,
        ("worker",),
        "Batches started that had been started before.",
    ),
    Metric(
        "embedq_worker_duplicates_total",
        _C,
        ("worker",),
        "Batches computed although another execution had already committed them.",
    ),
    Metric("embedq_worker_refused_total", _C, ("worker",), "Batches rejected as failed."),
    Metric("embedq_worker_set_aside_total", _C, ("worker",), "Texts moved to the dead letters."),
    Metric("embedq_jobs", _G, (), "Running jobs."),
    Metric(
        "embedq_job_created_timestamp_seconds", _G, ("job",), "Unix time of the start of the job."
    ),
    Metric("embedq_job_published_batches", _G, ("job",), "Batches of the job published so far."),
    Metric("embedq_job_committed_batches", _G, ("job",), "Batches of the job committed so far."),
    Metric(
        "embedq_job_untaken_batches",
        _G,
        ("job",),
        "Committed batches that the producer has not collected.",
    ),
    Metric("embedq_job_committed_texts", _G, ("job",), "Texts in committed batches."),
    Metric(
        "embedq_job_planned_texts",
        _G,
        ("job",),
        "Texts of the whole job; no series while the producer does not know the number.",
    ),
)

BY_NAME: Final = {metric.name: metric for metric in METRICS}


def table() -> str:
    """Return all metrics as a Markdown table."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines)


#: Counter in a heartbeat -> metric.
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

#: Maximum length of a reason code, characters; longer ones are shown as OTHER_REASON.
_MAX_CODE_LENGTH: Final = 40


@dataclass(frozen=True, slots=True)
class Sample:
    """One value of a metric.

    Attributes:
        name: name of the metric.
        labels: label values, in the metric's order.
        value: value of a gauge or counter, sum of a summary.
        count: count of a summary.
    """

    name: str
    labels: tuple[str, ...]
    value: float
    count: float = 0.0


def fleet_samples(fleet: FleetStatus) -> Iterator[Sample]:
    """Yield all samples of a fleet snapshot."""
    yield Sample("embedq_paused", (), float(fleet.paused is not None))
    for instance, memory in fleet.memory.items():
        yield Sample("embedq_redis_memory_used_bytes", (instance,), memory.used)
        yield Sample("embedq_redis_memory_limit_bytes", (instance,), memory.limit)
        yield Sample("embedq_redis_memory_used_ratio", (instance,), memory.ratio)
    for queue, ready in fleet.queues.items():
        yield Sample("embedq_queue_ready_messages", (queue,), ready)
        age_s = fleet.oldest_ready_s.get(queue, 0.0)
        yield Sample("embedq_queue_oldest_ready_age_seconds", (queue,), age_s)
    yield Sample("embedq_unacked_messages", (), fleet.unacked)
    yield Sample("embedq_unacked_oldest_age_seconds", (), fleet.oldest_unacked_s)
    yield Sample("embedq_unacked_oldest_lease_age_seconds", (), fleet.oldest_lease_s)
    yield Sample("embedq_dead_letters", (), fleet.dead)
    yield from _of_workers(fleet)
    yield from _of_jobs(fleet.jobs, fleet.at)


def _of_workers(fleet: FleetStatus) -> Iterator[Sample]:
    states = Counter(str(worker.state) for worker in fleet.workers)
    for state in STATES:
        yield Sample("embedq_workers", (state,), states[state])
    yield Sample("embedq_workers", (SILENT,), len(fleet.silent))
    for worker in fleet.workers[:MAX_WORKER_SERIES]:
        yield Sample("embedq_worker_up", (worker.worker,), 1)
        yield Sample("embedq_worker_last_beat_timestamp_seconds", (worker.worker,), worker.at)
        yield from _of_worker(worker)
    for name, at in sorted(fleet.silent.items())[:MAX_WORKER_SERIES]:
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
    if worker.code and len(worker.code) <= _MAX_CODE_LENGTH and worker.code.isidentifier():
        return worker.code
    return OTHER_REASON if worker.reason else NO_REASON


def _of_jobs(jobs: list[JobStatus], now: float) -> Iterator[Sample]:
    yield Sample("embedq_jobs", (), len(jobs))
    shown, rest = jobs[-MAX_JOB_SERIES:], jobs[:-MAX_JOB_SERIES]
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
