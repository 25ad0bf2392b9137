"""DistilBERT: BERT without token types, with names of its own.

Source: transformers, models/distilbert/modeling_distilbert.py.
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
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

_SIZES: Final = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "vocab_size": "vocab_size",
}

_NAMES: Final = PostNormNames(
    layer="transformer.layer.{}.",
    attention=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    intermediate="ffn.lin1",
    output="ffn.lin2",
    output_norm="output_layer_norm",
)


def read(config: JsonFile) -> Architecture:
    """Read config.json of a DistilBERT."""
    return {
        **read_sizes(config, _SIZES),
        "max_positions": config.integer("max_position_embeddings"),
        "hidden_act": read_activation(config, "activation", "gelu"),
        "layer_norm_eps": 1e-12,
    }


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    positions = w.get(
        "embeddings.position_embeddings.weight", w.config["max_positions"], w.config["hidden_size"]
    )
    hidden = embed_words(g, w, positions)
    return post_norm_layers(g, w, hidden, same_text_mask(g), _NAMES)


FAMILY: Final = Family(read, build, prefixes=("distilbert.",))
