"""Tests of ModernBERT without torch: its definition in numpy, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from tests.support.models import load_encoder
from tests.support.rotary import normalized, rotary_attention
from tests.unit.embedq_worker.model.families.test_families import (
    SMALL,
    TOLERANCE,
    packed_vectors,
    sequences,
)

from embedq_worker.errors import ModelError

CONFIG: Final[dict[str, Any]] = {
    **SMALL,
    "model_type": "modernbert",
    "local_attention": 12,
    "global_rope_theta": 5_000.0,
    "local_rope_theta": 300.0,
}


def random_tensors() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    dim, wide = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.tok_embeddings.weight": (CONFIG["vocab_size"], dim),
        "embeddings.norm.weight": (dim,),
        "final_norm.weight": (dim,),
    }
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {
            f"layers.{i}.attn.Wqkv.weight": (3 * dim, dim),
            f"layers.{i}.attn.Wo.weight": (dim, dim),
            f"layers.{i}.mlp_norm.weight": (dim,),
            f"layers.{i}.mlp.Wi.weight": (2 * wide, dim),
            f"layers.{i}.mlp.Wo.weight": (dim, wide),
        }
        if i:
            shapes[f"layers.{i}.attn_norm.weight"] = (dim,)
    return {
        name: rng.normal(float("norm" in name), 0.4, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def expected_vector(tensors: dict[str, Any], ids: list[int]) -> Any:
    """Embed one token sequence by Warner et al., ModernBERT (2024), section 2.1."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    h = normalized(w["embeddings.tok_embeddings.weight"][ids], w["embeddings.norm.weight"])
    for i in range(CONFIG["num_hidden_layers"]):
        name = f"layers.{i}."
        # Every third layer is global; the others see local_attention / 2 tokens to each side.
        theta, window = (300.0, 6.0) if i % 3 else (5_000.0, math.inf)
        x = normalized(h, w[f"{name}attn_norm.weight"]) if i else h
        mixed = rotary_attention(x, w[f"{name}attn.Wqkv.weight"], 4, theta, window)
        h = h + mixed @ w[f"{name}attn.Wo.weight"].T
        x = normalized(h, w[f"{name}mlp_norm.weight"])
        gate, up = np.split(x @ w[f"{name}mlp.Wi.weight"].T, 2, -1)
        h = h + (gelu(gate) * up) @ w[f"{name}mlp.Wo.weight"].T
    vector = normalized(h, w["final_norm.weight"]).mean(0)
    return vector / np.linalg.norm(vector)


def test_packed_vectors_are_those_of_the_definition(tmp_path: Path) -> None:
    tensors = random_tensors()
    model = load_encoder(tmp_path, CONFIG, tensors)

    vectors = packed_vectors(model, sequences())

    expected = np.stack([expected_vector(tensors, ids) for ids in sequences()])
    assert np.abs(vectors - expected).max() < TOLERANCE


def test_rope_parameters_say_the_same_as_the_older_keys(tmp_path: Path) -> None:
    tensors = random_tensors()
    old = load_encoder(tmp_path, CONFIG, tensors).architecture
    new = {name: value for name, value in CONFIG.items() if "theta" not in name}
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    }
    new["layer_types"] = [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")]

    assert load_encoder(tmp_path, new, tensors).architecture == old


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        # transformers 5 takes 2 x 5 for local_attention, transformers 4 takes 12.
        ({"sliding_window": 5}, "sliding_window is 5; embedq supports 6"),
        # transformers 4 takes global_rope_theta for it.
        ({"local_rope_theta": None}, "local_rope_theta is null"),
        ({"hidden_size": 36}, "the number of components of a head is 9"),
        ({"hidden_activation": "mish"}, "hidden_activation is mish"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 4.0}}},
            "rope_parameters is .*yarn",
        ),
    ],
)
def test_value_with_another_meaning_is_refused(
    tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=rf"config\.json: {reason}"):
        load_encoder(tmp_path, {**CONFIG, **values}, {})
