"""Qwen3: a decoder, whose tokens attend to those before them.

Source: transformers, models/qwen3/modeling_qwen3.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedq_worker.model.blocks import Rotary, not_after, rms_norm, same_text_mask
from embedq_worker.model.families.decoder import append_attention, append_network, read_decoder
from embedq_worker.model.families.family import FULL, Architecture, Family, read_theta
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder


def read(config: JsonFile) -> Architecture:
    """Read config.json of a Qwen3."""
    config.one_of("use_sliding_window", False)
    found = read_decoder(config, 128, ("hidden_act", "silu"))
    full = [FULL] * found["num_hidden_layers"]
    if config.get("layer_types", full) != full:
        raise config.unsupported("layer_types", config.get("layer_types"), f"{FULL} only")
    return {**found, "theta": read_theta(config, "rope_theta", 10_000.0)}


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    dim, size = w.config["hidden_size"], w.config["head_dim"]
    words = w.get("embed_tokens.weight", w.config["vocab_size"], dim)
    hidden = g.op("Gather", g.constant(words), "input_ids")
    mask, rotary = same_text_mask(g, not_after(g)), Rotary(g, size, w.config["theta"])

    def norm(value: str, name: str) -> str:
        return rms_norm(g, value, w.get(f"{name}.weight", dim), w.config["rms_norm_eps"])

    for layer in range(w.config["num_hidden_layers"]):
        name = f"layers.{layer}."
        normed = norm(hidden, f"{name}input_layernorm")
        attended = append_attention(g, w, name, normed, mask, rotary, scale=size**-0.5)
        hidden = g.op("Add", hidden, attended)
        normed = norm(hidden, f"{name}post_attention_layernorm")
        network = append_network(g, w, name, normed)
        hidden = g.op("Add", hidden, network)
    return norm(hidden, "norm")


FAMILY: Final = Family(read, build, prefixes=("model.",))
