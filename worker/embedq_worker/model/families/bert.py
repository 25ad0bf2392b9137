"""BERT: post-norm layers, absolute positions and token types.

Source: transformers, models/bert/modeling_bert.py, eager attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedq_worker.model.blocks import (
    PostNormNames,
    embed_words,
    merged_attention,
    post_norm_layer,
    same_text_mask,
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
    # All tokens have type 0, so its embedding is added to that of each position.
    types = w.get("embeddings.token_type_embeddings.weight", -1, w.config["hidden_size"])
    hidden = embed_words(g, w, positions + types[:1].sum(axis=0))
    mask = same_text_mask(g)
    for layer in range(w.config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}."
        parts = [f"{name}attention.self.{part}" for part in ("query", "key", "value")]
        mixed = merged_attention(g, w, hidden, parts, mask)
        names = PostNormNames(
            f"{name}attention.output.dense",
            f"{name}attention.output.LayerNorm",
            f"{name}intermediate.dense",
            f"{name}output.dense",
            f"{name}output.LayerNorm",
        )
        hidden = post_norm_layer(g, w, hidden, mixed, names)
    return hidden


FAMILY: Final = Family(read, build, prefixes=("bert.",))
