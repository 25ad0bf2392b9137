"""Forward passes of small random decoders, written from the papers; no code of the product.

Sources: Zhang and Sennrich, Root mean square layer normalization (2019); Su et al., RoFormer
(2021); Ainslie et al., GQA (2023); Shazeer, GLU variants improve transformer (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.support.models import write_json, write_modules, write_safetensors, write_tokenizer

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_padded, build_shared
from embedq_worker.model.resolve import Model, load_model

Array = npt.NDArray[Any]
Tensors = Mapping[str, npt.NDArray[np.float32]]

#: Values of config.json of both families; heads are wider than hidden_size / heads.
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}

#: Lengths of the texts, tokens.
LENGTHS = (1, 2, 8, 9, 10, 40, 300)


def texts() -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [[int(token) for token in rng.integers(4, 64, length)] for length in LENGTHS]


def write_decoder(
    folder: Path, config: Mapping[str, Any], norms: Sequence[str], pooling: str
) -> Tensors:
    """Write a model with random weights, and return its tensors.

    Args:
        folder: where to.
        config: config.json.
        norms: names of the norms of a layer that have hidden_size components.
        pooling: pooling mode.
    """
    rng = np.random.default_rng(7)
    dim, wide, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (heads, dim),
        "self_attn.k_proj.weight": (keys, dim),
        "self_attn.v_proj.weight": (keys, dim),
        "self_attn.o_proj.weight": (dim, heads),
        "self_attn.q_norm.weight": (size,),
        "self_attn.k_norm.weight": (size,),
        "mlp.gate_proj.weight": (wide, dim),
        "mlp.up_proj.weight": (wide, dim),
        "mlp.down_proj.weight": (dim, wide),
        **{f"{name}.weight": (dim,) for name in norms},
    }
    shapes = {"embed_tokens.weight": (config["vocab_size"], dim), "norm.weight": (dim,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    tensors = {
        name: rng.normal(0.5 if "norm" in name else 0.0, 0.4, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    write_safetensors(folder / "model.safetensors", {f"model.{k}": v for k, v in tensors.items()})
    write_json(folder / "config.json", config)
    write_modules(folder)
    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": pooling})
    write_tokenizer(folder / "tokenizer.json")
    return tensors


def served_vectors(folder: Path) -> tuple[Array, Array]:
    """Compute the vectors of all texts with the graph: one text a row, and several in two rows."""
    model: Model = load_model(folder, "m", DigestCache(folder / "cache"))
    ids, last = texts(), len(LENGTHS) - 1
    tokens = RaggedTokens(
        np.concatenate(ids).astype(np.int32),
        np.cumsum([0, *LENGTHS]).astype(np.int64),
        np.zeros(len(ids), np.uint32),
    )
    engine = OnnxRuntimeEngine(model, threads=1)
    apart = engine.infer(build_padded(tokens, range(len(ids)), pad_id=0))[:, 0]
    batch = build_shared(tokens, [[3, last, 0], [5, 1, 2, 4]], pad_id=0, width=320)
    found, together = engine.infer(batch), np.zeros_like(apart)
    for row, segment in np.argwhere(batch.members >= 0):
        together[batch.members[row, segment]] = found[row, segment]
    engine.close()
    return apart, together


def unit(vector: Array) -> Array:
    return np.asarray(vector / np.linalg.norm(vector))


def rms_norm(value: Array, scale: Array) -> Array:
    return np.asarray(value / np.sqrt((value**2).mean(-1, keepdims=True) + 1e-6) * scale)


def rotate(value: Array, theta: float) -> Array:
    """Turn [T, H, size]: component i and i + size / 2 are the parts of a complex number."""
    half = value.shape[-1] // 2
    angles = np.outer(np.arange(len(value)), theta ** (-np.arange(half) / half))
    turned = (value[..., :half] + 1j * value[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], -1)


def attention(
    tensors: Tensors,
    name: str,
    value: Array,
    config: Mapping[str, Any],
    allowed: npt.NDArray[np.bool_],
    *,
    theta: float,
    scale: float,
    offset: float,
) -> Array:
    """Mix [T, D]; `allowed` says which query sees which key, [T, T]."""
    size = config["head_dim"]

    def project(part: str) -> Array:
        weight = tensors[f"{name}self_attn.{part}_proj.weight"].astype(np.float64)
        return (value @ weight.T).reshape(len(value), -1, size)

    def turned(part: str) -> Array:
        norm = tensors[f"{name}self_attn.{part}_norm.weight"].astype(np.float64) + offset
        return rotate(rms_norm(project(part), norm), theta)

    query, key, values = turned("q"), turned("k"), project("v")
    mixed = np.zeros_like(query)
    for head in range(query.shape[1]):
        shared = head * key.shape[1] // query.shape[1]
        scores = np.where(allowed, query[:, head] @ key[:, shared].T * scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[:, head] = weights / weights.sum(-1, keepdims=True) @ values[:, shared]
    return mixed.reshape(len(value), -1) @ tensors[f"{name}self_attn.o_proj.weight"].T


def feed_forward(
    tensors: Tensors, name: str, value: Array, activation: Callable[[Array], Array]
) -> Array:
    gate, up, down = (tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (activation(value @ gate.T) * (value @ up.T)) @ down.T
