"""BERT: post-norm layers, absolute positions and token types.

Source: transformers, models/bert/modeling_bert.py, eager attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from embedq_worker.model.blocks import (
    PostNormNames,
    embed_words,
    post_norm_layers,
    same_text_mask,
)
from embedq_worker.model.families.family import Architecture, Family, read_activation, read_sizes
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Floats, Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

_NAMES: Final = PostNormNames(
    layer="encoder.layer.{}.",
    attention=("attention.self.query", "attention.self.key", "attention.self.value"),
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    intermediate="intermediate.dense",
    output="output.dense",
    output_norm="output.LayerNorm",
)


def read(config: JsonFile) -> Architecture:
    """Read config.json of a BERT."""
    config.one_of("position_embedding_type", "absolute")
    config.one_of("is_decoder", False)
    positions = config.integer("max_position_embeddings")
    return {
        **read_sizes(config),
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
    return post_norm_layers(g, w, hidden, same_text_mask(g), _NAMES)


FAMILY: Final = Family(read, build, prefixes=("bert.",))
