"""A real Intel NPU: set EMBEDQ_TEST_NPU=1 where there is one; nothing else proves its numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from tests.support.models import real_model
from tests.support.npu_emulation import (
    Process,
    embed_from_threads,
    embed_there,
    open_there,
    process,
)

from embedq_worker.engines.openvino_runtime import TARGETS

pytestmark = [
    pytest.mark.npu,
    pytest.mark.model,
    pytest.mark.skipif(
        os.environ.get("EMBEDQ_TEST_NPU") != "1", reason="needs an NPU; set EMBEDQ_TEST_NPU=1"
    ),
]

TEXTS = [f"Sentence number {i}, " * (1 + i % 30) for i in range(512)]


@pytest.fixture(scope="module")
def npu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The NPU, compiled for, proven and warm."""
    with process() as there:
        cache = tmp_path_factory.mktemp("cache")
        there.call(open_there, TARGETS["none"], real_model().folder, cache, {})
        yield there


def test_nothing_moves_in_a_thousand_inferences(npu: Process) -> None:
    """With pinned tensors the plugin reuses its command lists."""
    counters: dict[str, int] = {}
    while counters.get("inferences", 0) < 1_000:
        vectors, _, counters = npu.call(embed_there, TEXTS)
        assert np.isfinite(vectors).all()

    assert counters["binds"] == counters["pointer_changes"] == counters["shape_changes"] == 0


def test_concurrent_callers_are_served(npu: Process) -> None:
    """Eight callers get the same vectors."""
    found = npu.call(embed_from_threads, TEXTS, 8)

    assert all(vectors.tobytes() == found[0].tobytes() for vectors in found)
