"""Metric definitions and samples; pure.

Every metric that embedq exposes: name, kind, labels and meaning. No client library enters here.

Labels are bounded: queues and states are lists of ours, reasons are codes, and of nodes and jobs
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
from embedq.protocol.worker import Heartbeat

#: Most nodes that have series of their own, by name; all of them are counted in embedq_nodes.
MOST_NODES: Final = 256


#: Most jobs that have series of their own, newest first; the others are summed as OTHER_JOBS.
MOST_JOBS: Final = 20


#: Value of the label `job` for all others.
OTHER_JOBS: Final = "others"


#: Values of the label `state`; a node that is silent has no heartbeat and did not take leave.
STATES: Final = ("starting", "healthy", "degraded", "probing", "failed")


SILENT: Final = "silent"


#: Value of the label `reason` of a node that is as it should be, and of one with an unknown code.
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
    Metric("embedq_unacked_messages", _G, (), "Batches that nodes hold."),
    Metric(
        "embedq_unacked_oldest_age_seconds",
        _G,
        (),
        "Time since the oldest batch that a node holds was published; 0 when there is none.",
    ),
    Metric(
        "embedq_unacked_oldest_lease_age_seconds",
        _G,
        (),
        "Time since the oldest lease was renewed; beyond the visibility timeout its node is dead.",
    ),
    Metric("embedq_dead_letters", _G, (), "Texts set aside and kept (embedq dead ls)."),
    Metric("embedq_nodes", _G, ("state",), "Nodes in each state, or silent."),
    Metric("embedq_node_up", _G, ("node",), "1 if the node beat lately, 0 if it fell silent."),
    Metric(
        "embedq_node_last_beat_timestamp_seconds", _G, ("node",), "Unix time of the last heartbeat."
    ),
    Metric(
        "embedq_node_info",
        _G,
        ("node", "home", "device", "engine", "precision", "model"),
        "1; what a node is for (home) and what computes there now.",
    ),
    Metric(
        "embedq_node_state", _G, ("node", "state"), "1 for the state that a node is in, else 0."
    ),
    Metric(
        "embedq_node_reason",
        _G,
        ("node", "reason"),
        "1 for the code of why a node is not healthy, or none; embedq status has the sentence.",
    ),
    Metric(
        "embedq_node_state_since_timestamp_seconds",
        _G,
        ("node",),
        "Unix time of a node's last change of state.",
    ),
    Metric("embedq_node_batches_total", _C, ("node",), "Batches computed."),
    Metric("embedq_node_texts_total", _C, ("node",), "Texts computed."),
    Metric("embedq_node_tokens_total", _C, ("node",), "Tokens of these texts."),
    Metric(
        "embedq_node_computed_tokens_total",
        _C,
        ("node",),
        "The same with padding; tokens divided by this is how full rows are packed.",
    ),
    Metric("embedq_node_busy_seconds_total", _C, ("node",), "Time with a batch in hand."),
    Metric(
        "embedq_node_infer_seconds",
        _S,
        ("node",),
        "Time of inferences on the device, and how many; they may overlap.",
    ),
    Metric("embedq_node_rerouted_total", _C, ("node",), "Batches handed to another queue."),
    Metric(
        "embedq_node_redelivered_total",
        _C,
        ("node",),
        "Batches begun that somebody had begun before.",
    ),
    Metric(
        "embedq_node_duplicates_total",
        _C,
        ("node",),
        "Batches computed in vain: the ledger had them already.",
    ),
    Metric("embedq_node_refused_total", _C, ("node",), "Batches answered as failed."),
    Metric("embedq_node_set_aside_total", _C, ("node",), "Texts that no process survived."),
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
