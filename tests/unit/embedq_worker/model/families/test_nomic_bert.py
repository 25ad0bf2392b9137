"""Tests of NomicBERT in the form of the hub, without torch: its definition, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from tests.support.models import load_encoder
from tests.support.rotary import normalized, rotary_attention
from tests.unit.embedq_worker.model.families.test_families import (
    TOLERANCE,
    VOCABULARY,
    packed_vectors,
    sequences,
)

from embedq_worker.errors import ModelError

DIM, WIDE, LAYERS = 32, 48, 3
THETA, EPSILON = 700.0, 1e-3

CONFIG: Final[dict[str, Any]] = {
    "model_type": "nomic_bert",
    "n_embd": DIM,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_inner": WIDE,
    "n_positions": 128,
    "vocab_size": VOCABULARY,
    "activation_function": "swiglu",
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "rotary_emb_base": THETA,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "layer_norm_epsilon": EPSILON,
}

#: The same in the names of transformers.
SAVED: Final[dict[str, Any]] = {
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": WIDE,
    "layer_norm_eps": EPSILON,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
}


def random_tensors() -> dict[str, Any]:
    rng = np.random.default_rng(4)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (VOCABULARY, DIM),
        "embeddings.token_type_embeddings.weight": (2, DIM),
    }
    norms = ["emb_ln"]
    for i in range(LAYERS):
        shapes |= {
            f"encoder.layers.{i}.attn.Wqkv.weight": (3 * DIM, DIM),
            f"encoder.layers.{i}.attn.out_proj.weight": (DIM, DIM),
            f"encoder.layers.{i}.mlp.fc11.weight": (WIDE, DIM),
            f"encoder.layers.{i}.mlp.fc12.weight": (WIDE, DIM),
            f"encoder.layers.{i}.mlp.fc2.weight": (DIM, WIDE),
        }
        norms += [f"encoder.layers.{i}.norm1", f"encoder.layers.{i}.norm2"]
    for norm in norms:
        shapes |= {f"{norm}.weight": (DIM,), f"{norm}.bias": (DIM,)}
    return {
        name: rng.normal(0.0, 0.4, shape).astype(np.float32)
        + np.float32(name.removesuffix(".weight") in norms)
        for name, shape in shapes.items()
    }


def expected_vector(tensors: dict[str, Any], ids: list[int]) -> Any:
    """Embed one token sequence by the formulas of the hub's code.

    Source: modeling_hf_nomic_bert.py, NomicBertBlock with prenorm false, and its gated MLP:
    fc2(fc11(x) * silu(fc12(x))).
    """
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: Any, name: str) -> Any:
        return normalized(x, w[f"{name}.weight"], w[f"{name}.bias"], EPSILON)

    h = w["embeddings.word_embeddings.weight"][ids]
    h = norm(h + w["embeddings.token_type_embeddings.weight"][0], "emb_ln")
    for i in range(LAYERS):
        name = f"encoder.layers.{i}."
        mixed = rotary_attention(h, w[f"{name}attn.Wqkv.weight"], 4, THETA)
        h = norm(mixed @ w[f"{name}attn.out_proj.weight"].T + h, f"{name}norm1")
        gate = h @ w[f"{name}mlp.fc12.weight"].T
        inner = h @ w[f"{name}mlp.fc11.weight"].T * gate / (1 + np.exp(-gate))
        h = norm(inner @ w[f"{name}mlp.fc2.weight"].T + h, f"{name}norm2")
    vector = h.mean(0)
    return vector / np.linalg.norm(vector)


def test_packed_vectors_are_those_of_the_definition(tmp_path: Path) -> None:
    tensors = random_tensors()
    model = load_encoder(tmp_path, CONFIG, tensors)

    vectors = packed_vectors(model, sequences())

    expected = np.stack([expected_vector(tensors, ids) for ids in sequences()])
    assert np.abs(vectors - expected).max() < TOLERANCE


def test_names_of_transformers_beside_those_of_the_hub_must_agree(tmp_path: Path) -> None:
    tensors = random_tensors()
    both = load_encoder(tmp_path, {**CONFIG, **SAVED}, tensors)

    assert both.architecture["theta"] == THETA
    # What transformers takes where no rope_parameters are written.
    del (other := {**CONFIG, **SAVED})["rope_parameters"]
    with pytest.raises(ModelError, match=r"config\.json describes two models: theta is 1000\.0"):
        load_encoder(tmp_path, other, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "activation_function",
        "qkv_proj_bias",
        "mlp_fc1_bias",
        "mlp_fc2_bias",
        "rotary_emb_fraction",
        "rotary_emb_base",
    ],
)
def test_missing_value_has_the_meaning_of_the_hub_and_is_refused(tmp_path: Path, name: str) -> None:
    config = {key: value for key, value in CONFIG.items() if key != name}

    with pytest.raises(ModelError, match=rf"config\.json: {name} is "):
        load_encoder(tmp_path, config, random_tensors())


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base is 512"),
        ({"rotary_head_dim": True}, "rotary_head_dim is True"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved is True"),
        ({"activation_function": "geglu"}, "activation_function is geglu"),
        ({"n_embd": 36}, "the number of components of a head is 9"),
    ],
)
def test_value_that_the_graph_does_not_support_is_refused(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {reason}"):
        load_encoder(tmp_path, {**CONFIG, **values}, {})
