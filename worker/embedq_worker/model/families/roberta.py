"""RoBERTa, XLM-RoBERTa and CamemBERT: BERT whose positions start behind that of the padding.

Source: transformers, models/roberta/modeling_roberta.py, create_position_ids_from_input_ids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from embedq_worker.model.families import bert
from embedq_worker.model.families.family import Architecture, Family
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Floats, Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder


def read(config: JsonFile) -> Architecture:
    """Read config.json of a RoBERTa."""
    found = bert.read(config)
    pad_id = config.integer("pad_token_id", 1, minimum=0)
    if pad_id >= found["positions"] - 1:
        raise config.unsupported("pad_token_id", pad_id, "fewer than max_position_embeddings - 1")
    return {
        **found,
        "position_pad_id": pad_id,
        "max_positions": found["positions"] - pad_id - 1,
    }


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    positions = w.get(
        "embeddings.position_embeddings.weight", w.config["positions"], w.config["hidden_size"]
    )
    return bert.build_layers(g, w, pad_last(positions, w.config["position_pad_id"]))


def pad_last(positions: Floats, pad_id: int) -> Floats:
    """Drop the unused rows before the padding's position, whose row becomes the last: index -1."""
    return np.concatenate([positions[pad_id + 1 :], positions[pad_id : pad_id + 1]])


FAMILY: Final = Family(read, build, prefixes=("roberta.",))
