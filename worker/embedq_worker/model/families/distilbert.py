"""DistilBERT: BERT without token types, with names of its own.

Source: transformers, models/distilbert/modeling_distilbert.py.
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
    mask = same_text_mask(g)
    for layer in range(w.config["num_hidden_layers"]):
        name = f"transformer.layer.{layer}."
        parts = [f"{name}attention.{part}_lin" for part in "qkv"]
        mixed = merged_attention(g, w, hidden, parts, mask)
        names = PostNormNames(
            f"{name}attention.out_lin",
            f"{name}sa_layer_norm",
            f"{name}ffn.lin1",
            f"{name}ffn.lin2",
            f"{name}output_layer_norm",
        )
        hidden = post_norm_layer(g, w, hidden, mixed, names)
    return hidden


FAMILY: Final = Family(read, build, prefixes=("distilbert.",))
