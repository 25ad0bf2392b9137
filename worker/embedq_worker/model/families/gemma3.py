"""Gemma 3 as an encoder, which EmbeddingGemma is: its tokens attend to those on both sides.

Source: transformers, models/gemma3/modeling_gemma3.py and configuration_gemma3.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from embedq_worker.model.blocks import Rotary, rms_norm, same_text_mask, within
from embedq_worker.model.families.decoder import append_attention, append_network, read_decoder
from embedq_worker.model.families.family import (
    FULL,
    SLIDING,
    Architecture,
    Family,
    read_layer_types,
    read_theta,
)
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder


def read(config: JsonFile) -> Architecture:
    """Read config.json of a Gemma 3 text model."""
    config.one_of("use_bidirectional_attention", True, default=False)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.get(name) is not None:
            raise config.unsupported(name, config.get(name), "none")
    found = read_decoder(config, 256, ("hidden_activation", "gelu_pytorch_tanh"))
    layers = found["num_hidden_layers"]
    # transformers writes _sliding_window_pattern too, but does not read it.
    every = config.integer("sliding_window_pattern", 6)
    scalar = config.number("query_pre_attn_scalar", 256.0)
    if scalar <= 0:
        raise config.unsupported("query_pre_attn_scalar", scalar, "positive numbers")
    types = [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
    return {
        **found,
        "layer_types": read_layer_types(config, layers, types),
        "window": _read_window(config) // 2,
        "query_pre_attn_scalar": scalar,
        "theta": {
            FULL: read_theta(config, "rope_theta", 1_000_000.0, FULL),
            SLIDING: read_theta(config, "rope_local_base_freq", 10_000.0, SLIDING),
        },
    }


def _read_window(config: JsonFile) -> int:
    # Missing and null differ: transformers has a default for the one and fails with the other.
    if config.values.get("sliding_window", 0) is None:
        raise config.unsupported("sliding_window", None, "integers")
    return config.integer("sliding_window", 4096, minimum=0)


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    dim, size = w.config["hidden_size"], w.config["head_dim"]
    words = w.get("embed_tokens.weight", w.config["vocab_size"], dim)
    word = g.op("Gather", g.constant(words), "input_ids")
    hidden = g.op("Mul", word, g.constant(np.float32(dim**0.5)))
    types = sorted(set(w.config["layer_types"]))
    rotaries = {name: Rotary(g, size, w.config["theta"][name]) for name in types}
    masks = {FULL: same_text_mask(g), SLIDING: same_text_mask(g, within(g, w.config["window"]))}

    def norm(value: str, name: str) -> str:
        scale = w.get(f"{name}.weight", dim) + np.float32(1)
        return rms_norm(g, value, scale, w.config["rms_norm_eps"])

    for layer, kind in enumerate(w.config["layer_types"]):
        name = f"layers.{layer}."
        attended = append_attention(
            g,
            w,
            name,
            norm(hidden, f"{name}input_layernorm"),
            masks[kind],
            rotaries[kind],
            scale=w.config["query_pre_attn_scalar"] ** -0.5,
            offset=1.0,
        )
        hidden = g.op("Add", hidden, norm(attended, f"{name}post_attention_layernorm"))
        normed = norm(hidden, f"{name}pre_feedforward_layernorm")
        network = append_network(g, w, name, normed)
        hidden = g.op("Add", hidden, norm(network, f"{name}post_feedforward_layernorm"))
    return norm(hidden, "norm")


FAMILY: Final = Family(read, build, prefixes=("model.",))
