"""A look at the fleet as samples of metrics. Pure: no client library, no Redis, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from embedq.fleet import Heartbeat
from embedq.metrics import (
    MOST_JOBS,
    MOST_NODES,
    NO_REASON,
    OTHER_JOBS,
    OTHER_REASON,
    SILENT,
    STATES,
)
from embedq.status import FleetStatus, JobStatus

#: What nodes count -> the metric it is.
TOTALS: Final = {
    "batches": "embedq_node_batches_total",
    "texts": "embedq_node_texts_total",
    "tokens": "embedq_node_tokens_total",
    "computed_tokens": "embedq_node_computed_tokens_total",
    "busy_s": "embedq_node_busy_seconds_total",
    "rerouted": "embedq_node_rerouted_total",
    "redelivered": "embedq_node_redelivered_total",
    "duplicates": "embedq_node_duplicates_total",
    "refused": "embedq_node_refused_total",
    "set_aside": "embedq_node_set_aside_total",
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


def of_fleet(found: FleetStatus) -> Iterator[Sample]:
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
    yield from _of_nodes(found)
    yield from _of_jobs(found.jobs, found.at)


def _of_nodes(found: FleetStatus) -> Iterator[Sample]:
    states = Counter(node.state for node in found.nodes)
    for state in STATES:
        yield Sample("embedq_nodes", (state,), states[state])
    yield Sample("embedq_nodes", (SILENT,), len(found.silent))
    for node in found.nodes[:MOST_NODES]:
        yield Sample("embedq_node_up", (node.node,), 1)
        yield Sample("embedq_node_last_beat_timestamp_seconds", (node.node,), node.at)
        yield from _of_node(node)
    for name, at in sorted(found.silent.items())[:MOST_NODES]:
        yield Sample("embedq_node_up", (name,), 0)
        yield Sample("embedq_node_last_beat_timestamp_seconds", (name,), at)


def _of_node(node: Heartbeat) -> Iterator[Sample]:
    name = (node.node,)
    model = node.card.label if node.card else ""
    info = (*name, node.home, node.device, node.engine, node.precision, model)
    yield Sample("embedq_node_info", info, 1)
    for state in STATES:
        yield Sample("embedq_node_state", (*name, state), float(node.state == state))
    yield Sample("embedq_node_reason", (*name, _code(node)), 1)
    yield Sample("embedq_node_state_since_timestamp_seconds", name, node.since)
    totals = node.totals
    for key, metric in TOTALS.items():
        yield Sample(metric, name, float(totals.get(key, 0)))
    seconds, count = float(totals.get("infer_s", 0)), float(totals.get("inferences", 0))
    yield Sample("embedq_node_infer_seconds", name, seconds, count)


def _code(node: Heartbeat) -> str:
    if node.code and len(node.code) <= _LONGEST_CODE and node.code.isidentifier():
        return node.code
    return OTHER_REASON if node.reason else NO_REASON


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
