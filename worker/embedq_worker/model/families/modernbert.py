"""ModernBERT: pre-norm layers, rotary positions, gated networks, local attention in most layers.

Source: transformers, models/modernbert/modeling_modernbert.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedq_worker.model.blocks import (
    Heads,
    Rotary,
    attend,
    gated,
    layer_norm,
    linear,
    merged,
    same_text_mask,
    split_heads,
    split_layer,
    within,
)
from embedq_worker.model.families.family import (
    FULL,
    SLIDING,
    Architecture,
    Family,
    check_rotary_size,
    read_activation,
    read_layer_types,
    read_sizes,
    read_theta,
)
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder


def read(config: JsonFile) -> Architecture:
    """Read config.json of a ModernBERT."""
    sizes = read_sizes(config)
    layers = sizes["num_hidden_layers"]
    every = config.integer("global_attn_every_n_layers", 3)
    types = [SLIDING if layer % every else FULL for layer in range(layers)]
    window = config.integer("local_attention", 128) // 2
    # transformers 5 lets this one win, which older versions ignore.
    config.one_of("sliding_window", window)
    check_rotary_size(config, sizes["hidden_size"] // sizes["num_attention_heads"])
    # transformers 4 takes global_rope_theta for null, which transformers 5 does not load.
    if config.values.get("local_rope_theta", 0) is None:
        raise config.unsupported("local_rope_theta", "null", "a number")
    return {
        **sizes,
        "max_positions": config.integer("max_position_embeddings", 8192),
        "hidden_act": read_activation(config, "hidden_activation", "gelu"),
        "layer_norm_eps": config.number("norm_eps", 1e-5),
        "norm_bias": config.flag("norm_bias", False),
        "attention_bias": config.flag("attention_bias", False),
        "mlp_bias": config.flag("mlp_bias", False),
        "layer_types": read_layer_types(config, layers, types),
        "window": window,
        "theta": {
            FULL: read_theta(config, "global_rope_theta", 160_000.0, FULL),
            SLIDING: read_theta(config, "local_rope_theta", 10_000.0, SLIDING),
        },
    }


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    dim, heads = w.config["hidden_size"], w.config["num_attention_heads"]
    words = w.get("embeddings.tok_embeddings.weight", w.config["vocab_size"], dim)
    hidden = _norm(g, w, g.op("Gather", g.constant(words), "input_ids"), "embeddings.norm")
    types = sorted(set(w.config["layer_types"]))
    rotaries = {name: Rotary(g, dim // heads, w.config["theta"][name]) for name in types}
    masks = {FULL: same_text_mask(g), SLIDING: same_text_mask(g, within(g, w.config["window"]))}
    for layer, kind in enumerate(w.config["layer_types"]):
        hidden = _layer(g, w, layer, hidden, masks[kind], rotaries[kind])
    return _norm(g, w, hidden, "final_norm")


def _layer(g: OnnxBuilder, w: Weights, layer: int, hidden: str, mask: str, rotary: Rotary) -> str:
    dim, wide = w.config["hidden_size"], w.config["intermediate_size"]
    heads = Heads(w.config["num_attention_heads"], dim // w.config["num_attention_heads"])
    name = f"layers.{layer}."
    has_bias = w.config["attention_bias"]
    # The first layer follows the norm of the embeddings.
    normed = _norm(g, w, hidden, f"{name}attn_norm") if layer else hidden
    parts = split_layer(w.linear(f"{name}attn.Wqkv", 3 * dim, dim, bias=has_bias), 3)
    qkv = linear(g, normed, merged(parts, heads.size**-0.5))
    query, key, value = split_heads(g, qkv, heads)
    mixed = attend(g, rotary.turn(g, query), rotary.turn(g, key), value, mask, heads)
    attended = linear(g, mixed, w.linear(f"{name}attn.Wo", dim, dim, bias=has_bias))
    hidden = g.op("Add", hidden, attended)
    normed = _norm(g, w, hidden, f"{name}mlp_norm")
    gate, up = split_layer(w.linear(f"{name}mlp.Wi", 2 * wide, dim, bias=w.config["mlp_bias"]), 2)
    down = w.linear(f"{name}mlp.Wo", dim, wide, bias=w.config["mlp_bias"])
    return g.op("Add", hidden, gated(g, normed, gate, up, down, w.config["hidden_act"]))


def _norm(g: OnnxBuilder, w: Weights, value: str, name: str) -> str:
    dim = w.config["hidden_size"]
    bias = w.get(f"{name}.bias", dim) if w.config["norm_bias"] else None
    return layer_norm(g, value, w.get(f"{name}.weight", dim), bias, w.config["layer_norm_eps"])


FAMILY: Final = Family(read, build, prefixes=("model.",))
