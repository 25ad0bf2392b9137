"""Append to a graph what follows the encoder: pooling, and the modules behind it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import numpy as np

from embedq_worker.model.blocks import activate, layer_norm, linear
from embedq_worker.model.config import ModelConfig
from embedq_worker.model.modules import ACTIVATIONS, Module
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

#: Minimum divisor of a vector: empty segments stay zero. It is not zero in fp16.
MIN_NORM: Final = 1e-4

#: Epsilon of torch.nn.LayerNorm.
LAYER_NORM_EPSILON: Final = 1e-5


def append_pooling(g: OnnxBuilder, hidden: str, config: ModelConfig) -> None:
    """Turn token vectors into one vector per segment, [B, T, D] -> ``vectors`` [B, S, D'].

    Source: sentence_transformers, modules/pooling.py, dense.py, layer_norm.py and normalize.py.
    """
    pools = _Pools(g, hidden)
    parts = [pools.append(mode) for mode in config.pooling_modes]
    vectors = parts[0] if len(parts) == 1 else g.op("Concat", *parts, axis=-1)
    append_modules(g, vectors, config)


def append_modules(g: OnnxBuilder, vectors: str, config: ModelConfig) -> None:
    """Apply the modules behind the pooling to vectors [B, S, D] -> ``vectors`` [B, S, D']."""
    for module in config.modules:
        vectors = _append_module(g, vectors, module)
    g.op("Identity", vectors, out="vectors")


def _append_module(g: OnnxBuilder, vectors: str, module: Module) -> str:
    if module.kind == "Normalize":
        length = g.op("Max", g.reduce("ReduceL2", vectors, 18), g.constant(MIN_NORM))
        return g.op("Div", vectors, length)
    assert module.weights is not None  # read_modules found the file
    w = Weights(module.weights, {})
    if module.kind == "LayerNorm":
        scale, bias = (w.get(f"norm.{part}", module.out_features) for part in ("weight", "bias"))
        return layer_norm(g, vectors, scale, bias, LAYER_NORM_EPSILON)
    into, out = module.in_features, module.out_features
    product = linear(g, vectors, w.linear("linear", out, into, bias=module.bias))
    activation = ACTIVATIONS[module.activation]
    return activate(g, product, activation) if activation else product


class _Pools:
    """Poolings of the tokens of one graph; a matrix [B, S, T] weighs each token in each segment."""

    def __init__(self, g: OnnxBuilder, hidden: str) -> None:
        self._g, self._hidden = g, hidden
        # Tokens of a prompt that is not pooled have a negative segment.
        self._member = self._equals_number("segment_ids")

    def _equals_number(self, segment_ids: str) -> str:
        # Which tokens have the number of each segment, bool [B, S, T]
        g = self._g
        numbers = g.reshape("segments", 1, -1, 1)
        return g.op("Equal", numbers, g.reshape(segment_ids, 0, 1, -1))

    def append(self, mode: str) -> str:
        """Append one pooling, [B, T, D] -> [B, S, D]."""
        g = self._g
        if mode == "max":
            return g.op("MatMul", g.cast(self._last(), "float32"), self._running_maximum())
        if mode in ("cls", "lasttoken"):
            one = self._first() if mode == "cls" else self._last()
            return g.op("MatMul", g.cast(one, "float32"), self._hidden)
        weight = g.cast(self._member, "float32")
        if mode == "weightedmean":
            weight = g.op("Mul", weight, self._places())
        # Divided before the product: fp16 represents a sum of 512 token vectors badly.
        count = g.op("Max", g.reduce("ReduceSum", weight, 13), g.constant(1.0))
        if mode == "mean_sqrt_len_tokens":
            count = g.op("Sqrt", count)
        return g.op("MatMul", g.op("Div", weight, count), self._hidden)

    def _places(self) -> str:
        # Place of each token in its text from 1, prompt included, float32 [B, S, T]. Not from
        # position_ids, which skip padding tokens within a text in some families.
        g = self._g
        counts = g.cast(self._equals_number(g.text_ids), "int64")
        return g.cast(g.op("CumSum", counts, g.constant(2, np.int64)), "float32")

    def _first(self) -> str:
        # The first token of each segment that is pooled, [B, S, T]
        return self._g.op("And", self._member, self._g.op("Not", self._shifted_member(-1)))

    def _last(self) -> str:
        # The last token of each segment, [B, S, T]: the next one belongs to another
        return self._g.op("And", self._member, self._g.op("Not", self._shifted_member(1)))

    def _shifted_member(self, by: int) -> str:
        # The member of the next (1) or previous (-1) token, [B, S, T]
        g = self._g
        member = g.cast(self._member, "float32")
        shifted = g.shift(member, by, axis=2)
        return g.op("Greater", shifted, g.constant(0.5))

    def _running_maximum(self) -> str:
        # Greatest value so far of each component in each text, [B, T, D]: each step doubles the
        # number of tokens that it covers. Hillis and Steele, Data parallel algorithms (1986).
        g, values = self._g, self._hidden
        texts = g.reshape("segment_ids", 0, -1, 1)
        # Integers: a float in bf16 cannot tell text 256 from 257.
        for step in range(math.ceil(math.log2(max(2, g.max_length)))):
            earlier = g.shift(texts, -(2**step), axis=1)
            same = g.op("Equal", earlier, texts)
            moved = g.shift(values, -(2**step), axis=1)
            values = g.op("Where", same, g.op("Max", values, moved), values)
        return values
