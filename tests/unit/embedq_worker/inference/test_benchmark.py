"""Tests of the benchmark that compares candidate engines."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import cast

import pytest
from tests.support.models import tiny_model

from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selection import ROUNDS, TEXTS, benchmark


class Runner:
    """Stands in for an embedder; each round takes the next time on a shared clock."""

    def __init__(self, *seconds: float) -> None:
        self.seconds = iter(seconds)
        self.rounds = 0

    def embed(self, batch: object) -> None:
        self.rounds += 1
        Runner.now += next(self.seconds)

    now = 0.0


def test_best_round_counts_and_a_far_slower_engine_runs_once(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    steady, disturbed, slow = Runner(2, 2, 2, 2), Runner(2.5, 1.4, 9, 9), Runner(3)
    runners = {"steady": steady, "disturbed": disturbed, "slow": slow}

    found = benchmark(cast(dict[str, Embedder], runners), model, clock=lambda: Runner.now)

    assert found == pytest.approx({"steady": 2, "disturbed": 1.4, "slow": 3})
    assert (steady.rounds, disturbed.rounds, slow.rounds) == (2, ROUNDS, 1)


def test_benchmark_without_engines_is_empty(tmp_path: Path) -> None:
    assert benchmark({}, tiny_model(tmp_path)) == {}


def test_benchmark_texts_have_skewed_lengths() -> None:
    # Engines that pad must pay for it: most texts are short and few have equal length.
    lengths = [len(text.split()) for text in TEXTS]

    assert len(set(lengths)) > len(lengths) / 2
    assert statistics.median(lengths) < 0.7 * statistics.mean(lengths)
    assert max(lengths) > 20 * min(lengths)
