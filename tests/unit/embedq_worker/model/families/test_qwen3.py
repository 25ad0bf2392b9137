"""Tests of Qwen3 against a forward pass from the papers, and of what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.decoders import (
    SMALL,
    Array,
    Tensors,
    attention,
    feed_forward,
    rms_norm,
    served_vectors,
    texts,
    unit,
    write_decoder,
)

from embedq_worker.errors import ModelError
from embedq_worker.model.families.qwen3 import FAMILY
from embedq_worker.model.json_file import JsonFile

THETA = 5_000.0
CONFIG = {**SMALL, "model_type": "qwen3", "rope_theta": THETA, "hidden_act": "silu"}


def forward(tensors: Tensors, text: list[int]) -> Array:
    """Return the unit vector of the last token."""
    hidden = tensors["embed_tokens.weight"][text].astype(np.float64)
    allowed = np.tril(np.ones((len(text), len(text)), bool))
    for number in range(CONFIG["num_hidden_layers"]):
        name = f"layers.{number}."
        normed = rms_norm(hidden, tensors[f"{name}input_layernorm.weight"])
        hidden = hidden + attention(
            tensors,
            name,
            normed,
            CONFIG,
            allowed,
            theta=THETA,
            scale=CONFIG["head_dim"] ** -0.5,
            offset=0.0,
        )
        normed = rms_norm(hidden, tensors[f"{name}post_attention_layernorm.weight"])
        hidden = hidden + feed_forward(tensors, name, normed, lambda x: x / (1 + np.exp(-x)))
    return unit(rms_norm(hidden, tensors["norm.weight"])[-1])


def test_vectors_equal_a_forward_pass_written_from_the_papers(tmp_path: Path) -> None:
    norms = ("input_layernorm", "post_attention_layernorm")
    tensors = write_decoder(tmp_path, CONFIG, norms, "lasttoken")

    apart, together = served_vectors(tmp_path)

    expected = np.stack([forward(tensors, text) for text in texts()])
    assert np.abs(apart - expected).max() < 2e-5
    assert np.abs(together - expected).max() < 2e-5


def test_theta_of_transformers_5_is_that_of_older_versions() -> None:
    new = {**CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": THETA}}
    del new["rope_theta"]

    assert FAMILY.read(JsonFile(Path("config.json"), new)) == FAMILY.read(
        JsonFile(Path("config.json"), CONFIG)
    )


@pytest.mark.parametrize(
    "value",
    [
        {"is_causal": False},
        {"use_sliding_window": True},
        {"layer_types": ["sliding_attention"] * 3},
        {"head_dim": 15},
        {"rope_theta": 0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"hidden_act": "mish"},
    ],
)
def test_value_that_the_graph_does_not_support_is_refused(value: dict[str, Any]) -> None:
    (name,) = value

    with pytest.raises(ModelError, match=rf"config\.json: {name} is "):
        FAMILY.read(JsonFile(Path("config.json"), {**CONFIG, **value}))
