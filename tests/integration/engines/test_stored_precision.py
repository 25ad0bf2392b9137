"""A model whose file is less precise than f32 says so, and does not serve class exact."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import TensorProto
from tests.support.foreign import encoder, folder_with, half
from tests.support.models import WORDS
from tests.support.redis import RedisProcess
from tests.support.workers import stub_worker

from embedq import Client
from embedq.errors import BatchFailed, SettingsError
from embedq.protocol.contract import Precision

TEXTS = [" ".join(WORDS[i : i + 3]) for i in range(8)]


def test_half_precision_model_serves_standard_and_refuses_exact(
    redis: RedisProcess, short_dir: Path
) -> None:
    """The SDK refuses before it queues; a job of an SDK that does not ask fails with a code."""
    folder = os.fspath(folder_with(short_dir / "m", encoder(**half(TensorProto.FLOAT16))))
    settings = {"DEVICE": "cpu", "MODEL": folder, "CACHE_DIR": os.fspath(short_dir / "cache")}
    settings = {f"EMBEDQ_{name}": value for name, value in settings.items()}
    with (
        stub_worker(redis, short_dir, "half", **settings),
        Client(settings=redis.settings(model=folder)) as client,
    ):
        items = list(client.submit(TEXTS).results(timeout_s=30))
        with pytest.raises(SettingsError, match="has f16 weights") as refused:
            client.submit(TEXTS, accuracy="exact")
        info = client._discovery.model_info()
        client._discovery._model_info = replace(info, weights_precision="f32")
        with pytest.raises(BatchFailed, match=r"weights of .* are f16") as failed:
            client.encode(TEXTS, accuracy="exact", timeout_s=30)

    assert {item.outcome.precision for item in items} == {Precision.F16}
    assert str(refused.value).endswith("serve the model's f32 file.")
    assert failed.value.code == "not_exact"
