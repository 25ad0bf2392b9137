"""Tests of Gemma 3 against a forward pass from the papers, and of how its config.json is read."""

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
from embedq_worker.model.families.gemma3 import FAMILY
from embedq_worker.model.json_file import JsonFile

THETAS = {"full_attention": 5_000.0, "sliding_attention": 100.0}
#: As transformers 4 writes it. Each token sees eight before it and eight behind it.
CONFIG = {
    **SMALL,
    "model_type": "gemma3_text",
    "use_bidirectional_attention": True,
    "sliding_window": 17,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "query_pre_attn_scalar": 20,
    "rope_theta": THETAS["full_attention"],
    "rope_local_base_freq": THETAS["sliding_attention"],
}
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def gelu_tanh(value: Array) -> Array:
    """Source: Hendrycks and Gimpel, Gaussian error linear units (2016)."""
    inner = np.sqrt(2 / np.pi) * (value + 0.044715 * value**3)
    return np.asarray(0.5 * value * (1 + np.tanh(inner)))


def forward(tensors: Tensors, text: list[int]) -> Array:
    """Return the mean of the token vectors, scaled to unit length.

    Source: Gemma Team, Gemma 3 technical report (2025), section 2.
    """

    def norm(value: Array, name: str) -> Array:
        return rms_norm(value, 1 + tensors[f"{name}.weight"].astype(np.float64))

    places = np.arange(len(text))
    distances = np.abs(places[:, None] - places)
    hidden = tensors["embed_tokens.weight"][text].astype(np.float64) * np.sqrt(32)
    for number, kind in enumerate(CONFIG["layer_types"]):
        name = f"layers.{number}."
        reach = 8 if kind == "sliding_attention" else len(text)
        attended = attention(
            tensors,
            name,
            norm(hidden, f"{name}input_layernorm"),
            CONFIG,
            distances <= reach,
            theta=THETAS[kind],
            scale=20**-0.5,
            offset=1.0,
        )
        hidden = hidden + norm(attended, f"{name}post_attention_layernorm")
        normed = norm(hidden, f"{name}pre_feedforward_layernorm")
        network = feed_forward(tensors, name, normed, gelu_tanh)
        hidden = hidden + norm(network, f"{name}post_feedforward_layernorm")
    return unit(norm(hidden, "norm").mean(0))


def read(values: dict[str, Any]) -> dict[str, Any]:
    return FAMILY.read(JsonFile(Path("config.json"), values))


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


def test_vectors_equal_a_forward_pass_written_from_the_papers(tmp_path: Path) -> None:
    tensors = write_decoder(tmp_path, CONFIG, NORMS, "mean")

    apart, together = served_vectors(tmp_path)

    expected = np.stack([forward(tensors, text) for text in texts()])
    assert np.abs(apart - expected).max() < 2e-5
    assert np.abs(together - expected).max() < 2e-5


def test_thetas_of_transformers_5_are_those_of_older_versions() -> None:
    parameters = {kind: {"rope_type": "default", "rope_theta": x} for kind, x in THETAS.items()}

    new = read({**without("rope_theta", "rope_local_base_freq"), "rope_parameters": parameters})

    assert new == read(CONFIG)


@pytest.mark.parametrize(
    "patterns", [(), ("sliding_window_pattern",), ("_sliding_window_pattern",)]
)
@pytest.mark.parametrize("window", [1, 16, 17, 512])
def test_layers_and_window_are_those_of_transformers(patterns: tuple[str], window: int) -> None:
    transformers = pytest.importorskip("transformers")
    values = {**without("layer_types"), "sliding_window": window, **dict.fromkeys(patterns, 2)}

    found = read(values)

    expected = transformers.Gemma3TextConfig(**values)
    assert found["layer_types"] == expected.layer_types
    # transformers excludes the distance itself.
    assert found["window"] == expected.sliding_window - 1


@pytest.mark.parametrize(
    "value",
    [
        {"use_bidirectional_attention": False},
        {"is_causal": False},
        {"sliding_window": None},
        {"attn_logit_softcapping": 50.0},
        {"final_logit_softcapping": 30.0},
        {"query_pre_attn_scalar": 0},
        {"rope_local_base_freq": -1.0},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"hidden_activation": "mish"},
    ],
)
def test_value_that_the_graph_does_not_support_is_refused(value: dict[str, Any]) -> None:
    (name,) = value

    with pytest.raises(ModelError, match=rf"config\.json: {name} is "):
        read({**CONFIG, **value})
