"""BERT: post-norm layers, absolute positions and token types.

Source: transformers, models/bert/modeling_bert.py, eager attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedq_worker.model.blocks import (
    Heads,
    PostNormNames,
    attend,
    layer_norm,
    linear,
    merged,
    post_norm_layer,
    same_text_mask,
    split_heads,
)
from embedq_worker.model.families.family import Architecture, Family, read_activation, read_sizes
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Floats, Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

#: Sizes in config.json, which have the same name in an Architecture.
SIZES: Final = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)


def read(config: JsonFile) -> Architecture:
    """Read config.json of a BERT."""
    config.one_of("position_embedding_type", "absolute")
    config.one_of("is_decoder", False)
    positions = config.integer("max_position_embeddings")
    return {
        **read_sizes(config, {name: name for name in SIZES}),
        "positions": positions,
        "max_positions": positions,
        "hidden_act": read_activation(config, "hidden_act", "gelu"),
        "layer_norm_eps": config.number("layer_norm_eps", 1e-12),
    }


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    positions = w.get(
        "embeddings.position_embeddings.weight", w.config["positions"], w.config["hidden_size"]
    )
    return build_layers(g, w, positions)


def build_layers(g: OnnxBuilder, w: Weights, positions: Floats) -> str:
    """Append a BERT whose position i has the embedding positions[i], [B, T, D]."""
    dim, epsilon = w.config["hidden_size"], w.config["layer_norm_eps"]
    words = w.get("embeddings.word_embeddings.weight", w.config["vocab_size"], dim)
    # All tokens have type 0, so its embedding is added to that of each position.
    types = w.get("embeddings.token_type_embeddings.weight", -1, dim)[:1].sum(axis=0)
    word = g.op("Gather", g.constant(words), "input_ids")
    place = g.op("Gather", g.constant(positions + types), "position_ids")
    scale, bias = (w.get(f"embeddings.LayerNorm.{part}", dim) for part in ("weight", "bias"))
    hidden = layer_norm(g, g.op("Add", word, place), scale, bias, epsilon)
    mask = same_text_mask(g)
    for layer in range(w.config["num_hidden_layers"]):
        hidden = _layer(g, w, f"encoder.layer.{layer}.", hidden, mask)
    return hidden


def _layer(g: OnnxBuilder, w: Weights, name: str, hidden: str, mask: str) -> str:
    dim = w.config["hidden_size"]
    heads = Heads(w.config["num_attention_heads"], dim // w.config["num_attention_heads"])
    parts = [w.linear(f"{name}attention.self.{part}", dim, dim) for part in _PARTS]
    query, key, value = split_heads(g, linear(g, hidden, merged(parts, heads)), heads)
    mixed = attend(g, query, key, value, mask, heads)
    return post_norm_layer(
        g,
        w,
        hidden,
        mixed,
        PostNormNames(
            f"{name}attention.output.dense",
            f"{name}attention.output.LayerNorm",
            f"{name}intermediate.dense",
            f"{name}output.dense",
            f"{name}output.LayerNorm",
        ),
    )


_PARTS: Final = ("query", "key", "value")

FAMILY: Final = Family(read, build, prefixes=("bert.",))
