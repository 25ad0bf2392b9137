"""What golden texts should give is computed once, and believed only if it is unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tests.support.models import tiny_model

from embedq_worker.inference import verifier
from embedq_worker.inference.selftest import GOLDEN
from embedq_worker.inference.verifier import Vectors
from embedq_worker.model.resolve import Model


class Maker:
    """Makes vectors, and counts how often."""

    def __init__(self, model: Model) -> None:
        self.asked = 0
        self._shape = (len(GOLDEN), model.dim)

    def __call__(self) -> Vectors:
        self.asked += 1
        return np.full(self._shape, self.asked, np.float32)


def kept(cache: Path) -> Path:
    """Return the one file that was kept."""
    (path,) = cache.glob("compiled/*/reference-*")
    return path


def test_reference_is_made_once(model: Model, tmp_path: Path) -> None:
    """The second start reads it, beside the compiled models, from a file of mode 0600."""
    make = Maker(model)

    found = [verifier.load_or_make(model, tmp_path, make) for _ in range(3)]

    assert make.asked == 1
    assert all((vectors == 1).all() for vectors in found)
    assert kept(tmp_path).stat().st_mode & 0o777 == 0o600
    assert kept(tmp_path).parent.name == model.identity[:16]


def test_changed_reference_is_made_again(model: Model, tmp_path: Path) -> None:
    """A flipped byte, half a file and a file that others may write are not believed."""
    make = Maker(model)
    verifier.load_or_make(model, tmp_path, make)
    whole = kept(tmp_path).read_bytes()

    for damaged in (whole[:-1] + b"x", whole[:50], b""):
        kept(tmp_path).write_bytes(damaged)
        verifier.load_or_make(model, tmp_path, make)
    kept(tmp_path).chmod(0o622)
    verifier.load_or_make(model, tmp_path, make)

    assert make.asked == 5


def test_reference_of_another_model_is_not_taken(model: Model, tmp_path: Path) -> None:
    """Each identity has its own."""
    make = Maker(model)
    verifier.load_or_make(model, tmp_path, make)

    verifier.load_or_make(tiny_model(tmp_path / "other", seed=9), tmp_path, make)

    assert make.asked == 2


def test_cache_that_cannot_be_written_costs_time_only(model: Model, tmp_path: Path) -> None:
    """The reference is made at each start and serves all the same."""
    (tmp_path / "cache").write_text("in the way")
    make = Maker(model)

    for _ in range(2):
        assert verifier.load_or_make(model, tmp_path / "cache", make).size

    assert make.asked == 2
