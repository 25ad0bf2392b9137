"""Encoders with rotary positions by their definition, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def turn(x: Any, theta: float) -> Any:
    """Turn the pairs (i, i + size / 2) of each vector by its position, [T, size].

    Source: Su et al., RoFormer (2021), equation 14: a pair is a complex number.
    """
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half))
    pairs = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([pairs.real, pairs.imag], -1)


def rotary_attention(x: Any, qkv: Any, heads: int, theta: float, window: float = math.inf) -> Any:
    """Mix token vectors [T, D] by queries, keys and values, of which `qkv` is the weight [3D, D].

    A token attends to those at most `window` tokens away.
    """
    q, k, v = (np.split(x @ part.T, heads, -1) for part in np.split(qkv, 3))
    places = np.arange(len(x))
    near = np.abs(places[:, None] - places) <= window
    mixed = []
    for qh, kh, vh in zip(q, k, v, strict=True):
        scores = turn(qh, theta) @ turn(kh, theta).T / math.sqrt(qh.shape[-1])
        weights = np.exp(scores - scores.max()) * near
        mixed.append(weights / weights.sum(-1, keepdims=True) @ vh)
    return np.concatenate(mixed, -1)


def normalized(x: Any, scale: Any, bias: Any = 0.0, epsilon: float = 1e-5) -> Any:
    """Normalize the last axis to mean 0 and variance 1, then scale and shift it."""
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) * scale + bias
