"""Builds a BERT encoder as an ONNX graph from safetensors; every engine reads this graph.

Its inputs and output are described in onnx_graph. A change of the graph needs a higher
engines.model_cache.GRAPH_VERSION. No runtime enters here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
from onnx import helper

from embedq_worker.errors import ModelError
from embedq_worker.model.foreign_onnx import adapt_onnx
from embedq_worker.model.onnx_graph import OnnxBuilder, OnnxModel, pool

if TYPE_CHECKING:
    from embedq_worker.model.resolve import Model

#: Maximum size of a safetensors header, bytes; defined by the format.
MAX_HEADER_BYTES: Final = 100_000_000

#: ONNX operator set; the first with Gelu.
OPSET: Final = 20

#: Added to attention scores between different texts. exp(-1e4) is 0 in float32; -3.4e38 would be
#: -inf in fp16 and bf16, and give NaN in a row of padding only.
MASK: Final = -1e4

#: dtype in the header -> numpy dtype. Tensors of other dtypes, a few counters, are ignored.
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Floats = npt.NDArray[np.float32]

#: Graphs that an engine still uses, by the model's identity.
_cache: WeakValueDictionary[str, OnnxModel] = WeakValueDictionary()


def build_graph(model: Model) -> OnnxModel:
    """Build or adapt the graph of a model; the engines of a process share it.

    Raises:
        ModelError: the weights are damaged, or do not fit the configuration.
    """
    graph = _cache.get(model.identity)
    if graph is None:
        if model.packable:
            graph = _build_encoder(model)
        else:
            graph = adapt_onnx(model.weights, model.folder, model.pooling, model.normalize)
        _cache[model.identity] = graph
    return graph


def load_tensors(path: Path) -> dict[str, Floats]:
    """Map the floating-point tensors of a safetensors file by name, as float32; F32 is not copied.

    Raises:
        ModelError: the file is missing, truncated or not safetensors.

    Source: the section "Format" of the safetensors README.
    """
    try:
        raw = np.memmap(path, np.uint8, mode="r")
        size = int(raw[:8].view("<u8")[0])
        if size > min(MAX_HEADER_BYTES, len(raw) - 8):
            raise ValueError(f"the header claims {size:,} bytes of a file of {len(raw):,}")
        header = json.loads(raw[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        data = raw[8 + size :]
        return {
            name: _tensor(data, name, entry)
            for name, entry in header.items()
            if entry["dtype"] in _DTYPES
        }
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,  # 1e999 is valid JSON
        RecursionError,  # deeply nested JSON
    ) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({error}). Fetch the file again."
        ) from error


def _tensor(data: npt.NDArray[np.uint8], name: str, entry: Any) -> Floats:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    start, stop = entry["data_offsets"]
    shape = [int(n) for n in entry["shape"]]
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"tensor {name} lies outside the file, which may be truncated")
    if min(shape, default=0) < 0 or stop - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor {name} has {stop - start:,} bytes for shape {shape}")
    # frombuffer, not view: a tensor may be unaligned.
    flat = np.frombuffer(data[start:stop], dtype)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(flat, np.float32).reshape(shape)


def _build_encoder(model: Model) -> OnnxModel:
    # Source: transformers, models/bert/modeling_bert.py, eager attention.
    g = OnnxBuilder(OPSET)
    w = _Weights(model)
    hidden = _layer_norm(g, w, "embeddings.LayerNorm", _embed(g, w))  # [B, T, D]
    mask = _attention_mask(g)  # [B, 1, T, T]
    for layer in range(w.config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}."
        hidden = _layer(g, w, name, hidden, _attend(g, w, name, hidden, mask))
    pool(g, hidden, model.pooling, model.normalize)  # [B, T, D] -> [B, S, D]
    return g.graph(w.dim)


class _Weights:
    def __init__(self, model: Model) -> None:
        self._path = model.weights
        self._tensors = load_tensors(model.weights)
        prefixed = "bert.embeddings.word_embeddings.weight" in self._tensors
        self._prefix = "bert." if prefixed else ""
        self.config = model.architecture
        self.dim: int = self.config["hidden_size"]
        self.heads: int = self.config["num_attention_heads"]

    def get(self, name: str, *shape: int) -> Floats:
        """Return a tensor after checking its shape, in which -1 is any size."""
        tensor = self._tensors.get(self._prefix + name)
        if tensor is None:
            raise self._mismatch(f"tensor {name} is missing")
        fits = len(shape) == tensor.ndim and all(
            want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            found = f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}"
            raise self._mismatch(found)
        return tensor

    def linear(self, name: str, out: int, into: int) -> tuple[Floats, Floats]:
        """Return weight, transposed to [into, out], and bias [out]."""
        return self.get(f"{name}.weight", out, into).T, self.get(f"{name}.bias", out)

    def _mismatch(self, found: str) -> ModelError:
        return ModelError(
            f"{self._path} does not fit its config.json: {found}. Fetch both files again."
        )


def _embed(g: OnnxBuilder, w: _Weights) -> str:
    # [B, T] -> [B, T, D]
    words = w.get("embeddings.word_embeddings.weight", w.config["vocab_size"], w.dim)
    positions = w.get(
        "embeddings.position_embeddings.weight", w.config["max_position_embeddings"], w.dim
    )
    # All tokens have type 0, so its embedding is added to that of each position.
    types = w.get("embeddings.token_type_embeddings.weight", -1, w.dim)
    word = g.op("Gather", g.constant(words), "input_ids")
    return g.op("Add", word, g.op("Gather", g.constant(positions + types[0]), "position_ids"))


def _attention_mask(g: OnnxBuilder) -> str:
    # 0 for tokens of the same text, MASK for others, [B, 1, T, T]
    rows = g.reshape("segment_ids", 0, 1, -1, 1)
    columns = g.reshape("segment_ids", 0, 1, 1, -1)
    same = g.op("Equal", rows, columns)
    return g.op("Where", same, g.constant(0.0), g.constant(MASK))


def _layer(g: OnnxBuilder, w: _Weights, name: str, hidden: str, mixed: str) -> str:
    # Attention output and feed-forward network, [B, T, D] -> [B, T, D]
    attended = _linear(g, w, f"{name}attention.output.dense", mixed, w.dim, w.dim)
    hidden = _layer_norm(g, w, f"{name}attention.output.LayerNorm", g.op("Add", attended, hidden))
    wide = w.config["intermediate_size"]
    inner = _linear(g, w, f"{name}intermediate.dense", hidden, wide, w.dim)
    # Gelu without an attribute is the exact form, with erf, with which the weights were trained.
    active = g.op("Gelu" if w.config["hidden_act"] == "gelu" else "Relu", inner)
    outer = _linear(g, w, f"{name}output.dense", active, w.dim, wide)
    return _layer_norm(g, w, f"{name}output.LayerNorm", g.op("Add", outer, hidden))


def _merged_weights(w: _Weights, name: str) -> tuple[Floats, Floats]:
    # Weight [D, 3D] and bias [3D] of one product for queries, keys and values.
    query, key, value = (
        w.linear(f"{name}attention.self.{part}", w.dim, w.dim) for part in ("query", "key", "value")
    )
    # The query's weights contain the scale 1/sqrt(size) of the scores, to save a pass over [T, T].
    scale = np.float32((w.dim // w.heads) ** -0.5)
    parts = ((query[0] * scale, query[1] * scale), key, value)
    weight, bias = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
    return weight, bias


def _attend(g: OnnxBuilder, w: _Weights, name: str, hidden: str, mask: str) -> str:
    # Self-attention within each text, [B, T, D] -> [B, T, D]
    weight, bias = _merged_weights(w, name)
    merged = g.op("Add", g.op("MatMul", hidden, g.constant(weight)), g.constant(bias))
    size = w.dim // w.heads
    # [B, T, 3D] -> three of [B, T, D] -> queries and values [B, H, T, D/H], keys [B, H, D/H, T]
    query, key, value = (f"{name}{part}" for part in "qkv")
    sizes = g.constant([w.dim] * 3, np.int64)
    g.nodes.append(helper.make_node("Split", [merged, sizes], [query, key, value], axis=-1))
    query, key, value = (
        g.op("Transpose", g.reshape(part, 0, 0, w.heads, size), perm=perm)
        for part, perm in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
    )
    scores = g.op("Add", g.op("MatMul", query, key), mask)  # [B, H, T, T]
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)  # [B, H, T, D/H]
    return g.reshape(g.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, w.dim)


def _linear(g: OnnxBuilder, w: _Weights, name: str, value: str, out: int, into: int) -> str:
    weight, bias = w.linear(name, out, into)
    return g.op("Add", g.op("MatMul", value, g.constant(weight)), g.constant(bias))


def _layer_norm(g: OnnxBuilder, w: _Weights, name: str, value: str) -> str:
    scale, bias = (g.constant(w.get(f"{name}.{part}", w.dim)) for part in ("weight", "bias"))
    epsilon = w.config["layer_norm_eps"]
    return g.op("LayerNormalization", value, scale, bias, axis=-1, epsilon=epsilon)
