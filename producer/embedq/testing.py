"""Computes the vectors of the stub engine, so that a producer can verify every vector.

A vector depends on its text only and has the same bytes on every machine.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

#: Default number of components of a stub vector; equals all-MiniLM-L6-v2.
STUB_DIM: Final = 384

#: Number of hash bits that determine a vector.
HASH_BITS: Final = 64


def stub_vectors(texts: Iterable[str], dim: int = STUB_DIM) -> npt.NDArray[np.float32]:
    """Return the vectors that the stub engine computes for texts.

    Vectors of different texts are almost orthogonal, so mixed-up vectors are easy to detect.

    Returns:
        float32 [n, dim], unit length.
    """
    return vectors_of_hashes(stub_hashes(texts), dim)


def stub_hashes(texts: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Hash each text to 64 bits, uint64 [n]."""
    blake2b = hashlib.blake2b
    raw = b"".join([blake2b(text.encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(raw, "<u8").astype(np.uint64)


def vectors_of_hashes(
    hashes: npt.NDArray[np.uint64], dim: int = STUB_DIM
) -> npt.NDArray[np.float32]:
    """Convert hashes to unit vectors, float32 [n, dim].

    Each bit of a hash adds or subtracts one row of a fixed table of signs. The sums are integers,
    exact in float32 in any order, so the bytes depend neither on BLAS nor on the batch size.
    """
    table = _signs(dim)
    octets = np.ascontiguousarray(hashes, "<u8").view(np.uint8).reshape(-1, 8)
    bits = np.unpackbits(octets, axis=1, bitorder="little").astype(np.float32) * 2 - 1
    # The last row is always added: a sum of 65 signs is odd, so no vector is zero.
    sums: npt.NDArray[np.float32] = (
        bits @ table[:HASH_BITS] + table[HASH_BITS]
    )  # [n, 64] -> [n, dim]
    squares = np.einsum("nd,nd->n", sums, sums, dtype=np.float64)
    sums /= np.sqrt(squares).astype(np.float32)[:, None]
    return sums


@functools.cache
def _signs(dim: int) -> npt.NDArray[np.float32]:
    # Signs +-1, [65, dim], from a hash: the sequence of a numpy generator can change.
    n = (HASH_BITS + 1) * dim
    raw = np.frombuffer(hashlib.shake_256(b"embedq stub").digest(-(-n // 8)), np.uint8)
    signs = np.unpackbits(raw)[:n].astype(np.float32) * 2 - 1
    return signs.reshape(HASH_BITS + 1, dim)
