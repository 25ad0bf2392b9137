"""The checks of a chaos run detect each kind of corrupted output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from ops.chaos.judge import Findings, expected_stub, judge
from ops.chaos.producers import Task

from embedq.bulk.writers import sidecar_path
from embedq.testing import stub_vectors

#: Row of the one poisoned text.
POISONED = 3
Vectors = npt.NDArray[np.float32]
Items = list[dict[str, Any]]


def judged(folder: Path, corrupt: Callable[[Vectors, Items], tuple[Vectors, Items]]) -> Findings:
    """Write a correct output, corrupt it, and return the findings."""
    texts = [f"text {row}" for row in range(8)]
    texts[POISONED] = "embedq-fault:raise"
    task = Task(folder / "job.jsonl", folder / "job.npy", texts, frozenset({POISONED}))
    vectors = stub_vectors(texts)
    vectors[POISONED] = np.nan
    items: Items = [
        {"row": row, "id": task.row_id(row), "status": "ok", "code": ""} for row in range(8)
    ]
    items[POISONED].update(status="failed", code="set_aside")
    vectors, items = corrupt(vectors, items)
    np.save(task.output, vectors)
    sidecar_path(task.output).write_text("".join(json.dumps(item) + "\n" for item in items))
    findings = Findings()
    judge(task, expected_stub, findings)
    return findings


def test_right_output_has_no_findings(tmp_path: Path) -> None:
    assert judged(tmp_path, lambda vectors, items: (vectors, items)) == Findings()


def _flip_one_bit(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    vectors.view(np.uint32)[5, 7] ^= 1
    return vectors, items


def _swap_two_vectors(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    vectors[[0, 1]] = vectors[[1, 0]]
    return vectors, items


def _drop_the_last_row(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    return vectors[:-1], items[:-1]


def _repeat_a_row(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    return np.concatenate([vectors, vectors[:1]]), [*items, {**items[0], "row": 8}]


def _swap_two_ids(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    items[0]["id"], items[1]["id"] = items[1]["id"], items[0]["id"]
    return vectors, items


def _fail_a_good_text(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    vectors[6] = np.nan
    items[6].update(status="failed", code="set_aside")
    return vectors, items


def _embed_the_poison(vectors: Vectors, items: Items) -> tuple[Vectors, Items]:
    vectors[POISONED] = vectors[0]
    items[POISONED].update(status="ok", code="")
    return vectors, items


@pytest.mark.parametrize(
    ("corrupt", "finding"),
    [
        (_flip_one_bit, "wrong"),
        (_swap_two_vectors, "wrong"),
        (_drop_the_last_row, "lost"),
        (_repeat_a_row, "twice"),
        (_swap_two_ids, "twice"),
        (_fail_a_good_text, "wrongly_set_aside"),
        (_embed_the_poison, "not_set_aside"),
    ],
)
def test_corrupted_output_is_found(
    corrupt: Callable[[Vectors, Items], tuple[Vectors, Items]], finding: str, tmp_path: Path
) -> None:
    findings = judged(tmp_path, corrupt)

    assert getattr(findings, finding) > 0
    assert findings.breaches() > 0
