"""Build the parts that encoders share: embeddings, masks, attention, feed-forward networks, norms.

Shapes: B rows, T tokens of a row, D components, H heads. No runtime enters here, and no onnx: the
description of a model, which reads the families, needs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from embedq_worker.model.weights import Floats, Linear, Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

#: Added to attention scores between tokens that do not attend to each other. exp(-1e4) is 0 in
#: float32; -3.4e38 would be -inf in fp16 and bf16, and give NaN in a row of padding only.
MASK: Final = -1e4

#: Activation in config.json -> operator and attributes in ONNX.
#: Source: transformers, activations.py, ACT2FN.
ACTIVATIONS: Final[Mapping[str, tuple[str, Mapping[str, str]]]] = {
    "gelu": ("Gelu", {}),
    "gelu_python": ("Gelu", {}),
    "gelu_new": ("Gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("Gelu", {"approximate": "tanh"}),
    "gelu_fast": ("Gelu", {"approximate": "tanh"}),
    "relu": ("Relu", {}),
    "silu": ("Swish", {}),
    "swish": ("Swish", {}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
}


@dataclass(frozen=True, slots=True)
class Heads:
    """Sizes of an attention.

    Attributes:
        count: number of heads H.
        size: components of a head.
        shared: number of key and value heads; each serves count / shared query heads.
    """

    count: int
    size: int
    shared: int = 0

    @property
    def keys(self) -> int:
        """Return the number of key and value heads."""
        return self.shared or self.count


def activate(g: OnnxBuilder, value: str, name: str) -> str:
    """Apply an activation function of ACTIVATIONS."""
    operator, attributes = ACTIVATIONS[name]
    if operator == "Swish":  # an operator of its own only since operator set 24
        return g.op("Mul", value, g.op("Sigmoid", value))
    return g.op(operator, value, **attributes)


def linear(g: OnnxBuilder, value: str, layer: Linear) -> str:
    """Multiply by a weight [into, out], and add its bias if there is one."""
    weight, bias = layer
    product = g.op("MatMul", value, g.constant(weight))
    return product if bias is None else g.op("Add", product, g.constant(bias))


def layer_norm(
    g: OnnxBuilder, value: str, scale: Floats, bias: Floats | None, epsilon: float
) -> str:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift it."""
    parameters = [g.constant(scale), *([] if bias is None else [g.constant(bias)])]
    return g.op("LayerNormalization", value, *parameters, axis=-1, epsilon=epsilon)


def rms_norm(g: OnnxBuilder, value: str, scale: Floats, epsilon: float) -> str:
    """Divide the last axis by its root mean square, then scale it."""
    square = g.op("Mul", value, value)
    mean = g.op("ReduceMean", square, g.constant([-1], np.int64), keepdims=1)
    root = g.op("Sqrt", g.op("Add", mean, g.constant(epsilon)))
    return g.op("Mul", g.op("Div", value, root), g.constant(scale))


def same_text_mask(g: OnnxBuilder, *further: str) -> str:
    """Return 0 for pairs of tokens of the same text, MASK for others, [B, 1, T, T].

    Args:
        g: the graph.
        further: conditions, bool [T, T], that a pair must meet too.
    """
    texts = g.text_ids
    allowed = g.op("Equal", g.reshape(texts, 0, 1, -1, 1), g.reshape(texts, 0, 1, 1, -1))
    for condition in further:
        allowed = g.op("And", allowed, condition)
    return g.op("Where", allowed, g.constant(0.0), g.constant(MASK))


def distances(g: OnnxBuilder) -> str:
    """Return the place of each key in its row minus that of each query, int64 [T, T]."""
    width = g.op("Gather", g.op("Shape", "input_ids"), g.constant(1, np.int64))
    places = g.op("Range", g.constant(0, np.int64), width, g.constant(1, np.int64))
    return g.op("Sub", g.reshape(places, 1, -1), g.reshape(places, -1, 1))


def within(g: OnnxBuilder, distance: int) -> str:
    """Return which pairs of tokens are at most this far apart, bool [T, T]."""
    return g.op("LessOrEqual", g.op("Abs", distances(g)), g.constant(distance, np.int64))


def not_after(g: OnnxBuilder) -> str:
    """Return which pairs have a key that does not follow its query, bool [T, T]."""
    return g.op("LessOrEqual", distances(g), g.constant(0, np.int64))


def merged(parts: Sequence[Linear], scale: float) -> Linear:
    """Merge the layers of queries, keys and values into one product.

    Args:
        parts: the three layers.
        scale: factor of the queries; that of the scores here saves a pass over [T, T].
    """
    (weight, bias), *others = parts
    factor = np.float32(scale)
    scaled = [(weight * factor, None if bias is None else bias * factor), *others]
    biases = [bias for _, bias in scaled if bias is not None]
    return (
        np.concatenate([weight for weight, _ in scaled], axis=-1),
        np.concatenate(biases) if biases else None,
    )


def split_layer(layer: Linear, count: int) -> list[Linear]:
    """Split a layer whose outputs are those of several, one after the other."""
    weight, bias = layer
    biases = [None] * count if bias is None else np.split(bias, count)
    return list(zip(np.split(weight, count, axis=-1), biases, strict=True))


def split_heads(g: OnnxBuilder, value: str, heads: Heads) -> tuple[str, str, str]:
    """Split merged queries, keys and values, [B, T, ...] -> three of [B, T, H, size]."""
    sizes = [heads.count * heads.size, *[heads.keys * heads.size] * 2]
    counts = (heads.count, heads.keys, heads.keys)
    query, key, values = (
        g.reshape(part, 0, 0, count, heads.size)
        for part, count in zip(g.split(value, sizes), counts, strict=True)
    )
    return query, key, values


def attend(g: OnnxBuilder, query: str, key: str, value: str, mask: str, heads: Heads) -> str:
    """Mix the values of each text, [B, T, H, size] -> [B, T, H * size].

    Args:
        g: the graph.
        query: queries, already scaled.
        key, value: keys and values.
        mask: [B, 1, T, T] or [B, H, T, T], added to the scores.
        heads: sizes.
    """
    repeats = heads.count // heads.keys
    key, value = (_repeat_heads(g, part, heads, repeats) for part in (key, value))
    query = g.op("Transpose", query, perm=[0, 2, 1, 3])  # [B, H, T, size]
    key = g.op("Transpose", key, perm=[0, 2, 3, 1])  # [B, H, size, T]
    value = g.op("Transpose", value, perm=[0, 2, 1, 3])
    scores = g.op("Add", g.op("MatMul", query, key), mask)
    mixed = g.op("MatMul", g.op("Softmax", scores, axis=-1), value)
    return g.reshape(g.op("Transpose", mixed, perm=[0, 2, 1, 3]), 0, 0, heads.count * heads.size)


def _repeat_heads(g: OnnxBuilder, value: str, heads: Heads, repeats: int) -> str:
    # [B, T, keys, size] -> [B, T, keys * repeats, size], each head repeated in place
    if repeats == 1:
        return value
    apart = g.reshape(value, 0, 0, heads.keys, 1, heads.size)
    copied = g.op("Concat", *[apart] * repeats, axis=3)
    return g.reshape(copied, 0, 0, heads.count, heads.size)


class Rotary:
    """Rotary position embedding: turns pairs of components by an angle that grows with position.

    Source: Su et al., RoFormer (2021); transformers, rotate_half in modeling_llama.py.
    """

    def __init__(self, g: OnnxBuilder, size: int, theta: float) -> None:
        """Look up cosine and sine of each token's angles, [B, T, 1, size].

        Args:
            g: the graph.
            size: components of a head.
            theta: base of the frequencies.
        """
        powers = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        frequencies = (1.0 / np.power(theta, powers.astype(np.float64))).astype(np.float32)
        angles = np.outer(np.arange(g.max_length, dtype=np.float32), frequencies)
        both = np.concatenate([angles, angles], axis=-1).astype(np.float64)
        self._size = size
        self._cos, self._sin = (
            g.op("Unsqueeze", g.op("Gather", g.constant(table), "position_ids"), axis)
            for table in (np.cos(both), np.sin(both))
            for axis in [g.constant([2], np.int64)]
        )

    def turn(self, g: OnnxBuilder, value: str) -> str:
        """Turn queries or keys, [B, T, H, size]."""
        half = self._size // 2
        first, second = g.split(value, [half, half])
        turned = g.op("Concat", g.op("Neg", second), first, axis=-1)
        return g.op("Add", g.op("Mul", value, self._cos), g.op("Mul", turned, self._sin))


def gated(
    g: OnnxBuilder, value: str, gate: Linear, up: Linear, down: Linear, activation: str
) -> str:
    """Append a gated feed-forward network, [B, T, D] -> [B, T, D].

    Source: Shazeer, GLU variants improve transformer (2020).
    """
    opened = activate(g, linear(g, value, gate), activation)
    return linear(g, g.op("Mul", opened, linear(g, value, up)), down)


def embed_words(g: OnnxBuilder, w: Weights, positions: Floats) -> str:
    """Add the embeddings of each token and of its position, and normalize, [B, T, D].

    Args:
        g: the graph.
        w: weights with the names of BERT.
        positions: embedding of each position, [positions, D].
    """
    dim = w.config["hidden_size"]
    words = w.get("embeddings.word_embeddings.weight", w.config["vocab_size"], dim)
    word = g.op("Gather", g.constant(words), "input_ids")
    place = g.op("Gather", g.constant(positions), "position_ids")
    scale, bias = (w.get(f"embeddings.LayerNorm.{part}", dim) for part in ("weight", "bias"))
    return layer_norm(g, g.op("Add", word, place), scale, bias, w.config["layer_norm_eps"])


@dataclass(frozen=True, slots=True)
class PostNormNames:
    """Names of the tensors of one layer, all behind the name of the layer.

    Attributes:
        layer: name of a layer, with a place for its number.
        attention: queries, keys and values.
        attention_output, attention_norm, intermediate, output, output_norm: what follows.
    """

    layer: str
    attention: tuple[str, str, str]
    attention_output: str
    attention_norm: str
    intermediate: str
    output: str
    output_norm: str


def post_norm_layers(
    g: OnnxBuilder, w: Weights, hidden: str, mask: str, names: PostNormNames
) -> str:
    """Append the layers of BERT and its relatives, [B, T, D] -> [B, T, D].

    Each of attention and feed-forward network is added to its input and normalized.

    Args:
        g: the graph.
        w: weights.
        hidden: token vectors.
        mask: as in `attend`.
        names: names of the tensors.
    """
    for layer in range(w.config["num_hidden_layers"]):
        hidden = _post_norm_layer(g, w, names.layer.format(layer), hidden, mask, names)
    return hidden


def _post_norm_layer(
    g: OnnxBuilder, w: Weights, layer: str, hidden: str, mask: str, names: PostNormNames
) -> str:
    dim, wide = w.config["hidden_size"], w.config["intermediate_size"]
    count, epsilon = w.config["num_attention_heads"], w.config["layer_norm_eps"]
    heads = Heads(count, dim // count)

    def norm(value: str, name: str) -> str:
        scale, bias = (w.get(f"{layer}{name}.{part}", dim) for part in ("weight", "bias"))
        return layer_norm(g, value, scale, bias, epsilon)

    parts = [w.linear(layer + part, dim, dim) for part in names.attention]
    qkv = linear(g, hidden, merged(parts, heads.size**-0.5))
    mixed = attend(g, *split_heads(g, qkv, heads), mask, heads)
    attended = linear(g, mixed, w.linear(layer + names.attention_output, dim, dim))
    hidden = norm(g.op("Add", attended, hidden), names.attention_norm)
    inner = linear(g, hidden, w.linear(layer + names.intermediate, wide, dim))
    active = activate(g, inner, w.config["hidden_act"])
    outer = linear(g, active, w.linear(layer + names.output, dim, wide))
    return norm(g.op("Add", outer, hidden), names.output_norm)
