"""Whole workers with real engines return the right vectors through Celery and Redis."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tests.support.models import WORDS
from tests.support.redis import RedisProcess, wait_for
from tests.support.workers import stub_worker

from embedq import Client
from embedq.protocol.contract import Device, Outcome, Precision
from embedq.protocol.values import Vectors
from embedq_worker.engines.openvino_runtime import CPU, Runtime
from embedq_worker.model.resolve import Model

TEXTS = [" ".join(WORDS[i % 5 : i % 12]) + " x" * (i % 7) for i in range(60)]


def settings_of(model: Model, folder: Path, **settings: str) -> dict[str, str]:
    defaults = {"MODEL": os.fspath(model.folder), "CACHE_DIR": os.fspath(folder / "cache")}
    return {f"EMBEDQ_{name}": value for name, value in {**defaults, **settings}.items()}


def embed(
    redis: RedisProcess, model: Model, accuracy: str = "standard"
) -> tuple[Vectors, list[Outcome]]:
    with Client(settings=redis.settings(model=os.fspath(model.folder))) as client:
        found = list(client.submit(TEXTS, accuracy=accuracy).results(timeout_s=30))
    return np.array([item.vector for item in found]), [item.outcome for item in found]


def default_cpu_precision() -> Precision:
    """Return the precision that OpenVINO's CPU plugin uses by default."""
    capable = Runtime(CPU).get("OPTIMIZATION_CAPABILITIES").split(", ")
    order = {"FP16": Precision.F16, "BF16": Precision.BF16, "FP32": Precision.F32}
    return next(precision for name, precision in order.items() if name in capable)


def test_worker_on_an_emulated_npu_serves_the_npu_queues(
    model: Model, redis: RedisProcess, short_dir: Path
) -> None:
    """Only the pool process maps OpenVINO; outcomes, log and heartbeat name the precision."""
    settings = settings_of(model, short_dir, DEVICE="npu", NPU_EMULATION="alias", STRICT="1")
    with stub_worker(redis, short_dir, "alias", **settings) as worker:
        vectors, outcomes = embed(redis, model)

        (done,) = wait_for(lambda: worker.lines("batch_done"), "the log line of the batch")
        heartbeat = worker.heartbeat()
        # The supervisor, the main process and the pool process.
        mapped = [
            Path(f"/proc/{pid}/maps").read_text() for pid in (worker.process.pid, *worker.pids())
        ]

    precision = default_cpu_precision()
    assert {(item.device, item.precision) for item in outcomes} == {(Device.NPU, precision)}
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5
    assert f"engine=openvino device=npu precision={precision}" in done
    assert 0.5 < float(done.partition("pack_fill_ratio=")[2].split()[0]) <= 1
    assert heartbeat and (heartbeat.engine, heartbeat.precision) == ("openvino", precision)
    assert ["openvino" in libraries for libraries in mapped] == [False, False, True]
    assert ["onnxruntime" in libraries for libraries in mapped[:2]] == [False, False]


#: A sitecustomize.py that hides openvino from Python.
WITHOUT_OPENVINO = """
import importlib.machinery
import sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0].startswith("openvino"):
            return None
        return super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        for found in super().find_distributions(*context):
            if not found.metadata["Name"].startswith("openvino"):
                yield found

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
"""


def test_worker_without_openvino_serves_on_the_cpu(
    model: Model, redis: RedisProcess, short_dir: Path
) -> None:
    (short_dir / "sitecustomize.py").write_text(WITHOUT_OPENVINO)
    paths = [os.fspath(short_dir), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = settings_of(model, short_dir, DEVICE="auto")
    with stub_worker(
        redis, short_dir, "plain", **settings, PYTHONPATH=os.pathsep.join(paths)
    ) as one:
        standard, outcomes = embed(redis, model)
        exact, _ = embed(redis, model, "exact")
        loaded = [Path(f"/proc/{pid}/maps").read_text() for pid in (one.process.pid, *one.pids())]
        heartbeat = one.heartbeat()

    assert {(item.device, item.precision) for item in outcomes} == {(Device.CPU, Precision.F32)}
    assert standard.tobytes() == exact.tobytes()
    assert heartbeat and heartbeat.engine == "onnxruntime"
    assert ["onnxruntime" in libraries for libraries in loaded] == [False, False, True]
    assert not any("openvino" in libraries for libraries in loaded)


def test_cpu_worker_opens_an_engine_per_accuracy_class(
    model: Model, redis: RedisProcess, short_dir: Path
) -> None:
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no bf16")
    settings = settings_of(model, short_dir, DEVICE="cpu", PRECISION="bf16", ENGINE="openvino")
    with stub_worker(redis, short_dir, "cpu", **settings) as worker:
        standard, rounded = embed(redis, model)
        exact, precise = embed(redis, model, "exact")
        heartbeat = worker.heartbeat()

    assert {(item.device, item.precision) for item in rounded} == {(Device.CPU, Precision.BF16)}
    assert {(item.device, item.precision) for item in precise} == {(Device.CPU, Precision.F32)}
    assert 0.999 <= (standard * exact).sum(axis=1).min() < 0.9999999
    assert heartbeat and heartbeat.precision == "bf16"
