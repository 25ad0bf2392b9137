"""MPNet: positions as in RoBERTa, and a bias of the attention by the distance of two tokens.

Source: transformers, models/mpnet/modeling_mpnet.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from embedq_worker.model.blocks import (
    PostNormNames,
    distances,
    embed_words,
    post_norm_layers,
    same_text_mask,
)
from embedq_worker.model.families.family import Architecture, Family, read_activation, read_sizes
from embedq_worker.model.families.roberta import pad_last
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

#: Distance from which all tokens share a bucket.
MAX_DISTANCE: Final = 128

#: Number of buckets; transformers computes no other, whatever the size of the table.
_BUCKETS: Final = 32

#: Padding token, whatever config.json says.
_PAD_ID: Final = 1

_NAMES: Final = PostNormNames(
    layer="encoder.layer.{}.",
    attention=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    attention_output="attention.attn.o",
    attention_norm="attention.LayerNorm",
    intermediate="intermediate.dense",
    output="output.dense",
    output_norm="output.LayerNorm",
)


def read(config: JsonFile) -> Architecture:
    """Read config.json of an MPNet."""
    positions = config.integer("max_position_embeddings", minimum=_PAD_ID + 2)
    return {
        **read_sizes(config),
        "positions": positions,
        "position_pad_id": _PAD_ID,
        "max_positions": positions - _PAD_ID - 1,
        "buckets": config.one_of("relative_attention_num_buckets", _BUCKETS),
        "hidden_act": read_activation(config, "hidden_act", "gelu"),
        "layer_norm_eps": config.number("layer_norm_eps", 1e-12),
    }


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    positions = w.get(
        "embeddings.position_embeddings.weight", w.config["positions"], w.config["hidden_size"]
    )
    hidden = embed_words(g, w, pad_last(positions, _PAD_ID))
    mask = g.op("Add", _distance_bias(g, w), same_text_mask(g))
    return post_norm_layers(g, w, hidden, mask, _NAMES)


def buckets(distances: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return the bucket of each distance: exact when short, logarithmic up to MAX_DISTANCE.

    Args:
        distances: position of the key minus that of the query.
        count: number of buckets, half of them for keys behind the query.
    """
    half = count // 2
    behind = np.where(distances > 0, half, 0)
    far = np.abs(distances)
    exact = half // 2
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / exact) / np.log(MAX_DISTANCE / exact)
    coarse = exact + (ratio * (half - exact)).astype(np.int64)
    return behind + np.where(far < exact, far, np.minimum(coarse, half - 1))


def _distance_bias(g: OnnxBuilder, w: Weights) -> str:
    # Bias of each pair of tokens, [1, H, T, T]; the same for all layers
    heads, count = w.config["num_attention_heads"], w.config["buckets"]
    table = w.get("encoder.relative_attention_bias.weight", count, heads)
    every = np.arange(-MAX_DISTANCE, MAX_DISTANCE + 1)
    by_distance = g.constant(table[buckets(every, count)])
    limits = (g.constant(limit, np.int64) for limit in (-MAX_DISTANCE, MAX_DISTANCE))
    near = g.op("Clip", distances(g), *limits)
    place = g.op("Add", near, g.constant(MAX_DISTANCE, np.int64))
    bias = g.op("Transpose", g.op("Gather", by_distance, place), perm=[2, 0, 1])
    return g.op("Unsqueeze", bias, g.constant([0], np.int64))


FAMILY: Final = Family(read, build, prefixes=("mpnet.",))
