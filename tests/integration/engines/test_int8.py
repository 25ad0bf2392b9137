"""Accuracy class int8 with the real model: quantize, start a worker, embed, compare."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.support.models import docstrings
from tests.support.redis import RedisProcess
from tests.support.workers import stub_worker

from embedq import Client
from embedq.protocol.contract import Precision
from embedq_worker.cli.quantize import QuantizeOptions, run
from embedq_worker.settings import WorkerSettings


@pytest.mark.model
@pytest.mark.timeout(400)
def test_quantized_model_serves_class_int8(
    model_settings: dict[str, str], redis: RedisProcess, short_dir: Path, tmp_path: Path
) -> None:
    """The report names texts by line and contains none of them."""
    if importlib.util.find_spec("nncf") is None:
        if os.environ.get("CI"):
            pytest.fail("the extra dev brings nncf")
        pytest.skip("pip install 'embedq[quantize]'")
    texts = docstrings()[:90]
    source, cache = tmp_path / "texts.jsonl", tmp_path / "cache"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {name.removeprefix("EMBEDQ_").lower(): value for name, value in model_settings.items()}
    defaults = {"device": "cpu", "engine": "onnxruntime", "cache_dir": cache}
    settings = WorkerSettings.load(**values, **defaults)

    result = run(settings, QuantizeOptions((str(source),), texts=30, min_overlap=0.5), print)

    assert result.stored, result.problem
    assert result.report.cosine_mean > 0.99
    assert all(1 <= line <= len(texts) for line, _, _ in result.report.changed)
    assert not any(text[:40] in json.dumps(result.as_dict()) for text in texts)
    worker_settings = {**model_settings, "EMBEDQ_DEVICE": "cpu", "EMBEDQ_CACHE_DIR": str(cache)}
    worker_settings |= {"EMBEDQ_ENGINE": "onnxruntime"}
    producer = redis.settings(model=worker_settings["EMBEDQ_MODEL"], startup_timeout_s=90)
    with (
        stub_worker(redis, short_dir, "int8", **worker_settings),
        Client(settings=producer) as client,
    ):
        found = list(client.submit(texts[:20], accuracy="int8").results(timeout_s=90))
        exact = client.encode(texts[:20], accuracy="exact")
    vectors = np.array([item.vector for item in found])
    assert {item.outcome.precision for item in found} == {Precision.INT8}
    assert 0.98 < (vectors * exact).sum(axis=1).min() < 0.99999
