"""Tests of DistilBERT against the definition of BERT; test_families compares with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.models import TINY, reference_vector, write_json, write_safetensors, write_tiny

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_padded
from embedq_worker.model.resolve import load_model

#: Part of a name in BERT -> the same in DistilBERT.
#: Source: transformers, models/distilbert/modeling_distilbert.py.
NAMES = {
    "encoder.": "transformer.",
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
TYPES = "embeddings.token_type_embeddings.weight"


def renamed(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


@pytest.mark.parametrize("prefix", ["", "distilbert."])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_distilbert_is_a_bert_without_token_types(
    tmp_path: Path, prefix: str, activation: str
) -> None:
    tensors = write_tiny(tmp_path)
    stored = {prefix + renamed(name): value for name, value in tensors.items() if name != TYPES}
    write_safetensors(tmp_path / "model.safetensors", stored)
    config = {
        "model_type": "distilbert",
        "dim": TINY["hidden_size"],
        "n_layers": TINY["num_hidden_layers"],
        "n_heads": TINY["num_attention_heads"],
        "hidden_dim": TINY["intermediate_size"],
        "vocab_size": TINY["vocab_size"],
        "max_position_embeddings": TINY["max_position_embeddings"],
        "activation": activation,
        "sinusoidal_pos_embds": True,  # says how the stored table was made
    }
    write_json(tmp_path / "config.json", config)
    model = load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))
    ids = np.arange(10, 30)

    engine = OnnxRuntimeEngine(model, threads=1)
    tokens = RaggedTokens(ids.astype(np.int32), np.array([0, len(ids)]), np.zeros(1, np.uint32))
    vectors = engine.infer(build_padded(tokens, [0], 0))
    engine.close()

    untyped = {**tensors, TYPES: np.zeros_like(tensors[TYPES])}
    expected = reference_vector(untyped, {**TINY, "hidden_act": activation}, ids)
    assert np.abs(vectors[0, 0] - expected).max() < 2e-5
