"""Check the outputs of a chaos run: each vector, row and batch, and the keys left in Redis."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ops.chaos.fleet import Fleet
from ops.chaos.producers import Task
from ops.chaos.watch import Key, Watch

from embedq.bulk.writers import sidecar_path
from embedq.protocol.contract import Queue
from embedq.store.ledger import JOBS_KEY
from embedq.testing import stub_vectors

Array = npt.NDArray[np.float32]
#: Minimum cosine between a vector and the expected one, which had other batch neighbors.
MIN_COSINE: Final = 0.99999


@dataclass(slots=True)
class Findings:
    """Errors in the outputs, counted in texts.

    Attributes:
        lost: documents missing from the output.
        twice: documents that are duplicated or in the wrong row.
        wrong: vectors of another text.
        wrongly_set_aside: valid texts without a vector.
        not_set_aside: poisoned texts with a vector, or without the reason.
        not_identical: vectors that are right, but not bit-identical.
        examples: up to 20 of the errors, as messages.
    """

    lost: int = 0
    twice: int = 0
    wrong: int = 0
    wrongly_set_aside: int = 0
    not_set_aside: int = 0
    not_identical: int = 0
    examples: list[str] = field(default_factory=list)

    def breaches(self) -> int:
        """Count the errors that fail a run."""
        return self.lost + self.twice + self.wrong + self.wrongly_set_aside + self.not_set_aside

    def note(self, example: str) -> None:
        """Add an example."""
        if len(self.examples) < 20:
            self.examples.append(example)


def expected_stub(task: Task) -> Array:
    """Return the vectors of the stub engine, float32 [n, D]."""
    return stub_vectors(task.texts)


def judge(task: Task, expected: Callable[[Task], Array], findings: Findings) -> None:
    """Check the finished output of a task against its input."""
    vectors = np.load(task.output)
    lines = sidecar_path(task.output).read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    _judge_rows(task, items, len(vectors), findings)
    n = min(len(vectors), len(items), len(task.texts))
    right = expected(task)[:n]
    same = (vectors[:n].view(np.uint32) == right.view(np.uint32)).all(axis=1)  # [n]
    close = np.einsum("nd,nd->n", vectors[:n], right) >= MIN_COSINE
    exact = expected is expected_stub
    for row in range(n):
        failed = items[row]["status"] != "ok"
        if row in task.poisoned:
            _judge_poisoned(task, row, items[row], bool(np.isnan(vectors[row]).all()), findings)
        elif failed:
            findings.wrongly_set_aside += 1
            findings.note(f"{task.row_id(row)}: {items[row].get('code')}")
        elif not same[row]:
            findings.not_identical += 1
            if exact or not close[row]:
                findings.wrong += 1
                findings.note(f"{task.row_id(row)}: wrong vector")


def _judge_rows(task: Task, items: list[Any], n_vectors: int, findings: Findings) -> None:
    wanted = [task.row_id(row) for row in range(len(task.texts))]
    found = [item["id"] for item in items]
    missing = len(set(wanted) - set(found)) + max(0, len(wanted) - n_vectors)
    places = sum(1 for row, item in enumerate(items) if item["row"] != row)
    misplaced = len(found) - len(set(found)) + sum(1 for a, b in zip(wanted, found) if a != b)  # noqa: B905 # lengths may differ
    surplus = max(0, n_vectors - len(wanted))
    findings.lost += missing
    findings.twice += places + misplaced + surplus
    if missing or places or misplaced or surplus:
        findings.note(
            f"{task.input.stem}: {missing} missing, {misplaced} misplaced, {surplus} surplus"
        )


def _judge_poisoned(task: Task, row: int, item: Any, empty: bool, findings: Findings) -> None:
    if item["status"] != "failed" or item.get("code") != "set_aside" or not empty:
        findings.not_set_aside += 1
        findings.note(f"{task.row_id(row)}: poisoned, but {item['status']} {item.get('code')}")


def leftovers(fleet: Fleet) -> dict[str, int]:
    """Count what finished jobs have left in Redis; empty if Redis is clean."""
    broker, results = fleet.broker.client, fleet.results.client
    counts = {str(queue): int(broker.llen(str(queue))) for queue in Queue}
    counts["unacked"] = int(broker.hlen("unacked"))
    counts["unacked_index"] = int(broker.zcard("unacked_index"))
    counts["keys of jobs"] = sum(1 for _ in results.scan_iter("embedq:{*", count=1000))
    counts[JOBS_KEY] = int(results.zcard(JOBS_KEY))
    return {key: count for key, count in counts.items() if count}


@dataclass(frozen=True, slots=True)
class Executions:
    """Executions of the batches that contain no poisoned text.

    Attributes:
        batches: number of batches.
        finished: executions that finished.
        started: executions that started, including those that a fault interrupted.
        committed_twice: second commits under the same job id.
    """

    batches: int
    finished: int
    started: int
    committed_twice: int

    @property
    def extra_percent(self) -> float:
        """Repeated executions, in percent of all batches."""
        return 100 * (self.started / self.batches - 1) if self.batches else 0.0


def poisoned_batches(tasks: list[Task]) -> set[Key]:
    """Return the batches that contain a poisoned text, under every id of their jobs."""
    return {(job, index) for task in tasks for index in task.batches()[1] for job in task.jobs}


def recoveries(tasks: list[Task], watch: Watch) -> dict[str, list[float]]:
    """Return what was killed -> seconds until its batch was committed, without poisoned batches."""
    poisoned = poisoned_batches(tasks)
    clean = [(what, seconds) for what, key, seconds in watch.recoveries if key not in poisoned]
    by_kind = {
        kind: [s for what, s in clean if what == kind] for kind in ("pool process", "worker")
    }
    return {**by_kind, "redis": watch.redis_recoveries}


def count_executions(tasks: list[Task], watch: Watch) -> Executions:
    """Count the executions of the batches of tasks, under all ids of their jobs."""
    poisoned = poisoned_batches(tasks)
    known = {job for task in tasks for job in task.jobs}

    def total(counter: Mapping[Key, int]) -> int:
        return sum(n for key, n in counter.items() if key[0] in known and key not in poisoned)

    return Executions(
        batches=sum(n - len(indices) for n, indices in (task.batches() for task in tasks)),
        finished=total(watch.finished),
        started=total(watch.started),
        committed_twice=sum(n - 1 for key, n in watch.commits.items() if key[0] in known and n > 1),
    )
