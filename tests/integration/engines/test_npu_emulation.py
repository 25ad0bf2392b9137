"""The NPU path from settings to vectors, on emulated NPUs.

alias: OpenVINO's CPU plugin under another name. npuw: Intel's NPU plugin, computing on the CPU.
shim: the CPU plugin under the device name NPU. A fault operator injects faults of the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.models import WORDS, write_foreign, write_json
from tests.support.npu_emulation import (
    EngineProcess,
    arm_fault,
    close_npu,
    embed_from_threads,
    embed_texts,
    engine_process,
    open_faulty_npu,
    open_npu,
    target_of,
)
from tests.support.redis import environment

from embedq_worker import exit_codes
from embedq_worker.engines.openvino_runtime import TARGETS
from embedq_worker.errors import DeviceLost, FailureReason, InferFailed
from embedq_worker.files import DigestCache
from embedq_worker.model.resolve import Model, load_model

TEXTS = [" ".join(WORDS[i % 5 : i % 12]) + " x" * (i % 7) for i in range(60)]
ALIAS = TARGETS["alias"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=["alias", "npuw", "shim"])
def npu(request: pytest.FixtureRequest, model: Model, cache: Path) -> Iterator[EngineProcess]:
    target = target_of(str(request.param))
    with engine_process() as process:
        process.call(open_npu, target, model.folder, cache, {})
        yield process


def test_a_thousand_inferences_change_no_pointer(npu: EngineProcess) -> None:
    texts = TEXTS * 70
    _, before, first = npu.call(embed_texts, texts)

    _, after, last = npu.call(embed_texts, texts)

    assert before.inferences == after.inferences
    assert last["inferences"] - first["inferences"] == after.inferences > 1_000
    assert last["pointer_changes"] == last["shape_changes"] == last["stride_changes"] == 0


def test_concurrent_callers_share_the_infer_requests(npu: EngineProcess) -> None:
    expected, _, _ = npu.call(embed_texts, TEXTS)

    found = npu.call(embed_from_threads, TEXTS, 8)

    assert all(vectors.tobytes() == expected.tobytes() for vectors in found)


def test_cached_start_compiles_nothing(model: Model, cache: Path) -> None:
    """The second start imports the blob and loads neither onnx nor onnxruntime."""
    with engine_process() as process:
        process.call(open_npu, ALIAS, model.folder, cache, {})
    with engine_process() as process:
        again = process.call(open_npu, ALIAS, model.folder, cache, {})

    assert again["details"]["blob"] == "cached"
    assert again["modules"] == []


def test_concurrent_starts_compile_once(model: Model, tmp_path: Path) -> None:
    with engine_process() as one, engine_process() as other, ThreadPoolExecutor(2) as starts:
        opened = list(
            starts.map(
                lambda each: each.call(open_npu, ALIAS, model.folder, tmp_path, {}), (one, other)
            )
        )

    assert sorted(engine["details"]["blob"] for engine in opened) == ["cached", "compiled"]


def test_foreign_model_is_served_in_buckets(tmp_path: Path) -> None:
    """A model that cannot be packed has one text per row, in the smallest bucket that fits."""
    write_foreign(tmp_path)
    write_json(tmp_path / "config.json", {"max_position_embeddings": 32})
    foreign = load_model(tmp_path, "foreign", DigestCache(tmp_path))
    with engine_process() as process:
        opened = process.call(open_npu, ALIAS, foreign.folder, tmp_path / "cache", {})
        vectors, stats, counters = process.call(embed_texts, TEXTS)

    assert opened["details"]["rows"] == "buckets 16x32"
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert stats.inferences == len(TEXTS) + 1  # and the canary
    assert counters["pointer_changes"] == 0


def test_ignored_properties_are_reported(model: Model, cache: Path) -> None:
    properties = {"npu_commandlist_mode": "DEFAULT", "npu_properties": {"NPU_TURBO": "YES"}}
    with engine_process() as process:
        opened = process.call(open_npu, ALIAS, model.folder, cache, properties)

    assert opened["details"]["ignored"] == "NPU_COMMANDLIST_MODE=DEFAULT NPU_TURBO=YES"


def open_faulty(process: EngineProcess, model: Model, cache: Path) -> EngineProcess:
    process.call(open_faulty_npu, ALIAS, model.folder, cache, {"infer_timeout_s": 1.0})
    return process


@pytest.fixture(scope="module")
def faulty(model: Model, cache: Path) -> Iterator[EngineProcess]:
    with engine_process() as process:
        yield open_faulty(process, model, cache)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nan", FailureReason.NOT_FINITE),
        ("wrong", FailureReason.WRONG_CANARY),
        ("error", FailureReason.DEVICE_ERROR),
    ],
)
def test_fault_raises_and_later_inferences_succeed(
    faulty: EngineProcess, fault: str, reason: FailureReason
) -> None:
    expected, _, _ = faulty.call(embed_texts, TEXTS)
    assert np.isfinite(expected).all()

    faulty.call(arm_fault, fault, 5)
    with pytest.raises(InferFailed) as caught:
        faulty.call(embed_texts, TEXTS)
    faulty.call(arm_fault, "")

    assert caught.value.reason is reason
    assert faulty.call(embed_texts, TEXTS)[0].tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("fault", "reason"), [("lost", FailureReason.DEVICE_LOST), ("hang", FailureReason.DEADLINE)]
)
def test_lost_device_runs_no_further_inference(
    model: Model, cache: Path, fault: str, reason: FailureReason
) -> None:
    # Closing must not hang either.
    with engine_process() as process:
        open_faulty(process, model, cache).call(arm_fault, fault, 5)
        with pytest.raises(DeviceLost) as caught:
            process.call(embed_texts, TEXTS)
        process.call(arm_fault, "")
        with pytest.raises(DeviceLost):
            process.call(embed_texts, TEXTS)
        process.call(close_npu)

    assert caught.value.reason is reason


def run_cli(model: Model, cache: Path, *arguments: str, **settings: str) -> dict[str, Any]:
    """Run embedq-worker on an emulated NPU and return the JSON object of its stdout."""
    defaults = {
        "EMBEDQ_MODEL": os.fspath(model.folder),
        "EMBEDQ_CACHE_DIR": os.fspath(cache),
        "EMBEDQ_DEVICE": "npu",
        "EMBEDQ_NPU_EMULATION": "alias",
        "HOME": os.fspath(cache),
    }
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments, "--json"],
        env=environment(**{**defaults, **settings}),
        capture_output=True,
        check=False,
    )
    assert done.returncode == exit_codes.OK, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_plugin_log_and_telemetry_do_not_reach_stdout(model: Model, cache: Path) -> None:
    shown = run_cli(model, cache, "warm", OV_NPU_LOG_LEVEL="LOG_DEBUG")

    assert (shown["device"], shown["precision"]) != ("cpu", "f32")
    assert not (cache / "intel").exists()
