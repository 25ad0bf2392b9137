"""Run a real Intel NPU; set EMBEDQ_TEST_NPU=1 on a machine that has one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
from tests.support.models import real_model
from tests.support.npu_emulation import (
    EngineProcess,
    embed_from_threads,
    embed_texts,
    engine_process,
    open_npu,
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
def npu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with engine_process() as process:
        cache = tmp_path_factory.mktemp("cache")
        process.call(open_npu, TARGETS["none"], real_model().folder, cache, {})
        yield process


def test_a_thousand_inferences_change_no_pointer(npu: EngineProcess) -> None:
    # Otherwise the plugin could not reuse its command lists.
    counters: dict[str, int] = {}
    while counters.get("inferences", 0) < 1_000:
        vectors, _, counters = npu.call(embed_texts, TEXTS)
        assert np.isfinite(vectors).all()

    assert counters["pointer_changes"] == counters["shape_changes"] == 0


def test_concurrent_callers_get_identical_vectors(npu: EngineProcess) -> None:
    found = npu.call(embed_from_threads, TEXTS, 8)

    assert all(vectors.tobytes() == found[0].tobytes() for vectors in found)
