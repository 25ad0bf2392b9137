"""Tests of MPNet's bias by distance; test_families compares short texts with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.models import TINY, write_modules, write_tokenizer

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_shared
from embedq_worker.model.families import mpnet
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.resolve import load_model


def exact_bucket(distance: int) -> int:
    """Return one of 32 buckets by integers alone.

    8 + floor(8 log(n / 8) / log(128 / 8)) is 8 + floor(log2(n * n / 64)).

    Source: Raffel et al., T5 (2020), section 2.1; Song et al., MPNet (2020).
    """
    n = abs(distance)
    bucket = n if n < 8 else min(8 + (n * n // 64).bit_length() - 1, 15)
    return bucket + (16 if distance > 0 else 0)


def test_buckets_are_exact_at_every_distance() -> None:
    distances = np.arange(-600, 601)

    found = mpnet.buckets(distances, 32)

    assert found.tolist() == [exact_bucket(int(distance)) for distance in distances]


@pytest.mark.parametrize("count", [16, 64])
def test_other_number_of_buckets_is_refused(count: int) -> None:
    # transformers computes 32 buckets whatever this value is.
    config = JsonFile(Path("config.json"), {**TINY, "relative_attention_num_buckets": count})

    with pytest.raises(ModelError, match=f"relative_attention_num_buckets is {count};.* 32"):
        mpnet.read(config)


def test_distances_beyond_the_last_bucket_are_those_of_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {name: TINY[name] for name in ("hidden_size", "num_attention_heads", "vocab_size")}
    config = transformers.MPNetConfig(
        **sizes, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=300
    )
    reference = transformers.MPNetModel(config).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    reference.save_pretrained(tmp_path)
    write_modules(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.json")
    model = load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))
    lengths = [127, 128, 43, 298]
    ids = np.random.default_rng(2).integers(4, TINY["vocab_size"], sum(lengths))
    offsets = np.cumsum([0, *lengths])

    engine = OnnxRuntimeEngine(model, threads=1)
    tokens = RaggedTokens(ids.astype(np.int32), offsets, np.zeros(len(lengths), np.uint32))
    vectors = engine.infer(build_shared(tokens, [[0, 1, 2], [3]], 1, max(lengths)))
    engine.close()

    served = [*vectors[0], vectors[1, 0]]
    for start, stop, vector in zip(offsets[:-1], offsets[1:], served, strict=True):
        with torch.no_grad():
            states = reference(input_ids=torch.tensor(ids[None, start:stop])).last_hidden_state
        mean = states[0].mean(0).numpy()
        assert np.abs(vector - mean / np.linalg.norm(mean)).max() < 2e-5
