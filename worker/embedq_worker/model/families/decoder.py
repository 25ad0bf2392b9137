"""What Qwen3 and Gemma 3 share: attention with norms of queries and keys, and gated networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedq_worker.model.blocks import (
    Heads,
    Rotary,
    attend,
    gated,
    linear,
    merged,
    rms_norm,
    split_heads,
)
from embedq_worker.model.families.family import (
    SIZES,
    Architecture,
    check_rotary_size,
    read_activation,
)
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Floats, Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder


def read_decoder(config: JsonFile, head_size: int, activation: tuple[str, str]) -> Architecture:
    """Read the values that both families have.

    Args:
        config: config.json.
        head_size: components of a head if it does not say.
        activation: key and default of the activation function.

    Raises:
        ModelError: a value is missing, or one that `append_attention` does not support.
    """
    # transformers takes any decoder with false for one whose tokens attend to both sides.
    config.one_of("is_causal", True)
    sizes = {name: config.integer(name) for name in SIZES}
    heads = sizes["num_attention_heads"]
    shared = config.integer("num_key_value_heads", heads)
    if heads % shared:
        raise config.unsupported("num_key_value_heads", shared, f"divisors of {heads} heads")
    size = config.integer("head_dim", head_size)
    check_rotary_size(config, size, "head_dim")
    return {
        **sizes,
        "num_key_value_heads": shared,
        "head_dim": size,
        "max_positions": config.integer("max_position_embeddings", 32_768),
        "hidden_act": read_activation(config, *activation),
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "attention_bias": config.flag("attention_bias", False),
    }


def append_attention(
    g: OnnxBuilder,
    w: Weights,
    name: str,
    value: str,
    mask: str,
    rotary: Rotary,
    *,
    scale: float,
    offset: float = 0.0,
) -> str:
    """Append the attention of one layer, [B, T, D] -> [B, T, D].

    Args:
        g: the graph.
        w: weights.
        name: prefix of the layer's tensors.
        value: normalized token vectors.
        mask: as in `blocks.attend`.
        rotary: rotary positions.
        scale: factor of the scores.
        offset: added to the scale of each norm.
    """
    config = w.config
    dim, size, epsilon = config["hidden_size"], config["head_dim"], config["rms_norm_eps"]
    heads = Heads(config["num_attention_heads"], size, config["num_key_value_heads"])
    bias = config["attention_bias"]
    counts = {"q": heads.count, "k": heads.keys, "v": heads.keys}
    parts = [
        w.linear(f"{name}self_attn.{part}_proj", count * size, dim, bias=bias)
        for part, count in counts.items()
    ]
    query, key, values = split_heads(g, linear(g, value, merged(parts, 1.0)), heads)
    # The norm of the queries contains the scale of the scores, to save a pass over [T, T].
    query_scale: Floats = (w.get(f"{name}self_attn.q_norm.weight", size) + offset) * scale
    key_scale: Floats = w.get(f"{name}self_attn.k_norm.weight", size) + offset
    query = rotary.turn(g, rms_norm(g, query, query_scale, epsilon))
    key = rotary.turn(g, rms_norm(g, key, key_scale, epsilon))
    mixed = attend(g, query, key, values, mask, heads)
    return linear(g, mixed, w.linear(f"{name}self_attn.o_proj", dim, heads.count * size, bias=bias))


def append_network(g: OnnxBuilder, w: Weights, name: str, value: str) -> str:
    """Append the gated feed-forward network of one layer to normalized vectors, [B, T, D]."""
    dim, wide = w.config["hidden_size"], w.config["intermediate_size"]
    gate = w.linear(f"{name}mlp.gate_proj", wide, dim, bias=False)
    up = w.linear(f"{name}mlp.up_proj", wide, dim, bias=False)
    down = w.linear(f"{name}mlp.down_proj", dim, wide, bias=False)
    return gated(g, value, gate, up, down, w.config["hidden_act"])
