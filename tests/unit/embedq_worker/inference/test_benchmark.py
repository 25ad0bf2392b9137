"""The race between engines is fair, and as short as it can be."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import cast

import pytest
from tests.support.models import tiny_model

from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selection import ROUNDS, TEXTS, benchmark


class Runner:
    """Stands in for an embedder: each round takes it so long on a clock of its own."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)
        self.rounds = 0

    def embed(self, batch: object) -> None:
        """Take the next time."""
        self.rounds += 1
        Runner.now += next(self.seconds)

    now = 0.0


def test_best_round_counts_and_a_hopeless_engine_runs_once(tmp_path: Path) -> None:
    """A disturbed round is forgiven; what is far behind is not tried again."""
    model = tiny_model(tmp_path)
    steady, disturbed, hopeless = Runner(2, 2, 2, 2), Runner(2.5, 1.4, 9, 9), Runner(3)
    runners = {"steady": steady, "disturbed": disturbed, "hopeless": hopeless}

    found = benchmark(cast(dict[str, Embedder], runners), model, clock=lambda: Runner.now)

    assert found == pytest.approx({"steady": 2, "disturbed": 1.4, "hopeless": 3})
    assert (steady.rounds, disturbed.rounds, hopeless.rounds) == (2, ROUNDS, 1)


def test_no_engine_no_race(tmp_path: Path) -> None:
    """Where none was proven there is nothing to measure."""
    assert benchmark({}, tiny_model(tmp_path)) == {}


def test_race_is_run_over_texts_as_prose_has_them() -> None:
    """Most are short and few of equal length: an engine that pads must show what it costs."""
    lengths = [len(text.split()) for text in TEXTS]

    assert len(set(lengths)) > len(lengths) / 2
    assert statistics.median(lengths) < 0.7 * statistics.mean(lengths)
    assert max(lengths) > 20 * min(lengths)
