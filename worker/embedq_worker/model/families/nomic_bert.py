"""NomicBERT: BERT with rotary positions and a gated network.

config.json and the tensors have the names of nomic-ai's own code or those of transformers 5.

Source: transformers, models/nomic_bert/modeling_nomic_bert.py and conversion_mapping.py;
modeling_hf_nomic_bert.py of nomic-ai/nomic-bert-2048.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from embedq_worker.errors import ModelError
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
)
from embedq_worker.model.families.family import (
    Architecture,
    Family,
    check_rotary_size,
    read_activation,
    read_sizes,
    read_theta,
)
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Linear, Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

_HUB_SIZES: Final = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True, slots=True)
class _Names:
    # Names of the tensors; those of a layer are behind `layer`. One name in `attention` is that of
    # queries, keys and values together.
    embeddings_norm: str
    layer: str
    attention: tuple[str, ...]
    attention_output: str
    attention_norm: str
    gate: str
    up: str
    down: str
    output_norm: str


_HUB_NAMES: Final = _Names(
    embeddings_norm="emb_ln",
    layer="encoder.layers.{}.",
    attention=("attn.Wqkv",),
    attention_output="attn.out_proj",
    attention_norm="norm1",
    gate="mlp.fc12",
    up="mlp.fc11",
    down="mlp.fc2",
    output_norm="norm2",
)

_NAMES: Final = _Names(
    embeddings_norm="embeddings.LayerNorm",
    layer="layers.{}.",
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    attention_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    output_norm="post_mlp_layernorm",
)

#: Value that the graph is built for, and the one that the hub's code takes where none is written.
#: Source: configuration_hf_nomic_bert.py of nomic-ai/nomic-bert-2048, and GPT2Config below it.
_HUB_VALUES: Final[Mapping[str, tuple[object, object]]] = {
    "prenorm": (False, False),
    "parallel_block": (False, False),
    "activation_function": ("swiglu", "gelu_new"),
    "qkv_proj_bias": (False, True),
    "mlp_fc1_bias": (False, True),
    "mlp_fc2_bias": (False, True),
    "use_rms_norm": (False, False),
    "rotary_emb_interleaved": (False, False),
    "rotary_head_dim": (False, False),
    "causal": (False, False),
}


def read(config: JsonFile) -> Architecture:
    """Read config.json of a NomicBERT."""
    if config.get("n_embd") is None:
        return _read_saved(config)
    hub = _read_hub(config)
    if config.get("hidden_size") is None:
        return hub
    # transformers 5 keeps the names of the hub beside its own, and reads only its own.
    saved = _read_saved(config)
    for name in sorted(saved.keys() - {"max_positions"}):
        if saved[name] != hub[name]:
            raise ModelError(
                f"{config.path} describes two models: {name} is {saved[name]} in the names of "
                f"transformers and {hub[name]} in those of the hub; embedq supports equal values. "
                "Remove the names that do not belong to the weights."
            )
    return saved


def _read_hub(config: JsonFile) -> Architecture:
    for name, (value, default) in _HUB_VALUES.items():
        config.one_of(name, value, default=default)
    if config.number("rotary_emb_fraction", 0.0) != 1.0:
        raise config.unsupported("rotary_emb_fraction", config.get("rotary_emb_fraction"), 1.0)
    if config.get("rotary_emb_scale_base") is not None:
        raise config.unsupported(
            "rotary_emb_scale_base", config.get("rotary_emb_scale_base"), "none"
        )
    # Versions of the hub's code differ in what they take where none is written.
    if config.get("rotary_emb_base") is None:
        raise config.unsupported("rotary_emb_base", "missing", "a number")
    positions = config.integer("n_positions", 1024)
    # With a factor, longer texts than it was trained with change all frequencies.
    if config.get("rotary_scaling_factor") is not None:
        positions = min(positions, config.integer("max_trained_positions", 2048))
    sizes = read_sizes(config, _HUB_SIZES)
    check_rotary_size(config, sizes["hidden_size"] // sizes["num_attention_heads"])
    return {
        **sizes,
        "max_positions": positions,
        "hidden_act": "silu",
        "layer_norm_eps": config.number("layer_norm_epsilon", 1e-5),
        "theta": config.number("rotary_emb_base", 0.0),
    }


def _read_saved(config: JsonFile) -> Architecture:
    sizes = read_sizes(config)
    size = sizes["hidden_size"] // sizes["num_attention_heads"]
    config.one_of("head_dim", size)
    check_rotary_size(config, size)
    return {
        **sizes,
        "max_positions": config.integer("max_position_embeddings", 2048),
        "hidden_act": read_activation(config, "hidden_act", "silu"),
        "layer_norm_eps": config.number("layer_norm_eps", 1e-12),
        "theta": read_theta(config, "rope_theta", 1_000.0),
    }


def build(g: OnnxBuilder, w: Weights) -> str:
    """Append embeddings and layers, [B, T, D]."""
    dim, count = w.config["hidden_size"], w.config["num_attention_heads"]
    names = _HUB_NAMES if w.has("emb_ln.weight") else _NAMES
    words = w.get("embeddings.word_embeddings.weight", w.config["vocab_size"], dim)
    types = w.get("embeddings.token_type_embeddings.weight", -1, dim)
    word = g.op("Gather", g.constant(words), "input_ids")
    hidden = g.op("Add", word, g.constant(types[:1].sum(axis=0)))
    hidden = _norm(g, w, hidden, names.embeddings_norm)
    mask, rotary = same_text_mask(g), Rotary(g, dim // count, w.config["theta"])
    for layer in range(w.config["num_hidden_layers"]):
        hidden = _layer(g, w, names.layer.format(layer), hidden, mask, rotary, names)
    return hidden


def _layer(
    g: OnnxBuilder, w: Weights, layer: str, hidden: str, mask: str, rotary: Rotary, names: _Names
) -> str:
    dim, wide = w.config["hidden_size"], w.config["intermediate_size"]
    heads = Heads(w.config["num_attention_heads"], dim // w.config["num_attention_heads"])

    def layer_of(name: str, out: int, into: int) -> Linear:
        return w.linear(layer + name, out, into, bias=False)

    if len(names.attention) == 1:
        parts = split_layer(layer_of(names.attention[0], 3 * dim, dim), 3)
    else:
        parts = [layer_of(name, dim, dim) for name in names.attention]
    qkv = linear(g, hidden, merged(parts, heads.size**-0.5))
    query, key, value = split_heads(g, qkv, heads)
    mixed = attend(g, rotary.turn(g, query), rotary.turn(g, key), value, mask, heads)
    attended = linear(g, mixed, layer_of(names.attention_output, dim, dim))
    hidden = _norm(g, w, g.op("Add", hidden, attended), layer + names.attention_norm)
    gate, up = (layer_of(name, wide, dim) for name in (names.gate, names.up))
    down = layer_of(names.down, dim, wide)
    network = gated(g, hidden, gate, up, down, w.config["hidden_act"])
    return _norm(g, w, g.op("Add", hidden, network), layer + names.output_norm)


def _norm(g: OnnxBuilder, w: Weights, value: str, name: str) -> str:
    scale, bias = (w.get(f"{name}.{part}", w.config["hidden_size"]) for part in ("weight", "bias"))
    return layer_norm(g, value, scale, bias, w.config["layer_norm_eps"])


FAMILY: Final = Family(read, build)
