"""Tests of the cache of reference vectors of the golden texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.support.models import tiny_model

from embedq.protocol.values import Vectors
from embedq_worker.inference import verifier
from embedq_worker.inference.selftest import GOLDEN
from embedq_worker.model.resolve import Model


class CountingReference:
    """Computes reference vectors and counts the calls."""

    def __init__(self, model: Model) -> None:
        self.calls = 0
        self._shape = (len(GOLDEN), model.dim)

    def __call__(self) -> Vectors:
        self.calls += 1
        return np.full(self._shape, self.calls, np.float32)


def cached_file(cache: Path) -> Path:
    (path,) = cache.glob("compiled/*/reference-*")
    return path


def test_reference_is_computed_once_and_stored_privately(model: Model, tmp_path: Path) -> None:
    compute = CountingReference(model)

    found = [verifier.load_or_compute(model, tmp_path, compute) for _ in range(3)]

    assert compute.calls == 1
    assert all((vectors == 1).all() for vectors in found)
    assert cached_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert cached_file(tmp_path).parent.name == model.identity[:16]


def test_untrusted_reference_is_computed_again(model: Model, tmp_path: Path) -> None:
    compute = CountingReference(model)
    verifier.load_or_compute(model, tmp_path, compute)
    whole = cached_file(tmp_path).read_bytes()

    for damaged in (whole[:-1] + b"x", whole[:50], b""):
        cached_file(tmp_path).write_bytes(damaged)
        verifier.load_or_compute(model, tmp_path, compute)
    cached_file(tmp_path).chmod(0o622)
    verifier.load_or_compute(model, tmp_path, compute)

    assert compute.calls == 5


def test_reference_of_another_model_is_not_used(model: Model, tmp_path: Path) -> None:
    compute = CountingReference(model)
    verifier.load_or_compute(model, tmp_path, compute)

    verifier.load_or_compute(tiny_model(tmp_path / "other", seed=9), tmp_path, compute)

    assert compute.calls == 2


def test_unusable_cache_folder_means_a_computation_per_start(model: Model, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    compute = CountingReference(model)

    for _ in range(2):
        assert verifier.load_or_compute(model, tmp_path / "cache", compute).size

    assert compute.calls == 2
