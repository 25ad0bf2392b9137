"""The value that holds vectors in Redis: a 32-byte header, raw little-endian rows, their outcomes.

One batch is stored as values of at most 256 KiB, each with as many rows as fit.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq.contract import Dtype
from embedq.errors import CorruptValue
from embedq.outcomes import OutcomeTable

#: float32, or float16 where a job asks for it.
Vectors = npt.NDArray[np.float32]

_MAGIC: Final = b"EQV1"
#: magic, dtype, flags, reserved, dim, rows, bytes of outcomes, fingerprint, crc32 of all the rest.
_HEADER: Final = struct.Struct("<4sBBHIII8sI")
#: Type of the components -> its number in the header, and its name in numpy.
_NUMBERS: Final = {Dtype.FLOAT32: 1, Dtype.FLOAT16: 2}
DESCRIPTIONS: Final = {Dtype.FLOAT32: "<f4", Dtype.FLOAT16: "<f2"}
#: Bytes of a component.
ITEM_BYTES: Final = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2}
_BATCH_FAILED: Final = 1

#: Bytes of one value at most: large enough to be few, small enough to fetch a piece at a time.
MAX_VALUE_BYTES: Final = 256 * 1024
#: Bytes of the outcome of one row.
_OUTCOME_BYTES: Final = 10
#: Bytes reserved in a value for the distinct kinds of its outcomes.
_KINDS_BYTES: Final = 74


@dataclass(frozen=True, slots=True)
class Value:
    """One decoded value: some rows of a batch, or the reason why the batch was refused.

    Attributes:
        vectors: float32 or float16 [rows, D]; failed texts are NaN.
        outcomes: one per row.
        failure: (code, detail) when the whole batch was refused; then there are no rows.
    """

    vectors: Vectors
    outcomes: OutcomeTable
    failure: tuple[str, str] | None = None


def encode(
    vectors: Vectors,
    outcomes: OutcomeTable,
    fingerprint: bytes,
    dtype: Dtype = Dtype.FLOAT32,
) -> bytes:
    """Encode rows and their outcomes as one value.

    Args:
        vectors: float32 [n, D].
        outcomes: n outcomes.
        fingerprint: 8 bytes of the specification that made them.
        dtype: what they are stored as. float16 rounds a component of a unit vector by at most
            2**-12, and the cosine of two of them by less than 2**-10 (IEEE 754: 11 bits).
    """
    rows, dim = vectors.shape
    tail = outcomes.to_bytes()
    body = np.ascontiguousarray(vectors, DESCRIPTIONS[dtype]).data.cast("B") if rows else b""
    return _assemble(_NUMBERS[dtype], 0, dim, rows, len(tail), fingerprint, (body, tail))


def encode_failure(code: str, detail: str) -> bytes:
    """Encode the refusal of a whole batch; it is made under no specification."""
    tail = f"{code}\n{detail}".encode()[:4096]
    return _assemble(_NUMBERS[Dtype.FLOAT32], _BATCH_FAILED, 0, 0, len(tail), bytes(8), (tail,))


def decode(value: bytes, fingerprint: bytes) -> Value:
    """Check and decode one value; the vectors share its memory and are read-only.

    Raises:
        CorruptValue: wrong size, checksum or type, or made under another specification.
    """
    if len(value) < _HEADER.size:
        raise CorruptValue(f"A value of {len(value)} bytes is shorter than its header.")
    magic, number, flags, _, dim, rows, tail_bytes, made_by, checksum = _HEADER.unpack_from(value)
    dtype = next((kind for kind, known in _NUMBERS.items() if known == number), Dtype.FLOAT32)
    size = _HEADER.size + ITEM_BYTES[dtype] * dim * rows + tail_bytes
    if magic != _MAGIC or number != _NUMBERS[dtype] or size != len(value):
        raise CorruptValue(f"A value of {len(value):,} bytes does not match its header.")
    if _checksum(value[: _HEADER.size], (memoryview(value)[_HEADER.size :],)) != checksum:
        raise CorruptValue(f"A value of {len(value):,} bytes fails its checksum.")
    # A refusal counts whatever was asked for: the worker may not have been able to read it.
    if made_by != fingerprint and not flags & _BATCH_FAILED:
        raise CorruptValue(
            f"A value was made under specification {made_by.hex()}, expected {fingerprint.hex()}."
        )
    vectors = np.frombuffer(value, DESCRIPTIONS[dtype], rows * dim, _HEADER.size).reshape(rows, dim)
    tail = memoryview(value)[size - tail_bytes :]
    if flags & _BATCH_FAILED:
        code, _, detail = bytes(tail).decode(errors="replace").partition("\n")
        return Value(vectors, OutcomeTable.from_outcomes([]), (code, detail))
    return Value(vectors, OutcomeTable.from_bytes(tail, rows))


def split_rows(n: int, dim: int, dtype: Dtype = Dtype.FLOAT32) -> Iterator[tuple[int, int]]:
    """Cut n rows into values of at most MAX_VALUE_BYTES, each with as many rows as fit.

    Yields:
        (start, stop) of each value.
    """
    per_row = ITEM_BYTES[dtype] * dim + _OUTCOME_BYTES
    most = max(1, (MAX_VALUE_BYTES - _HEADER.size - _KINDS_BYTES) // per_row)
    for start in range(0, n, most):
        yield start, min(start + most, n)


def _assemble(
    number: int,
    flags: int,
    dim: int,
    rows: int,
    tail_bytes: int,
    fingerprint: bytes,
    parts: tuple[bytes | memoryview, ...],
) -> bytes:
    fields = (_MAGIC, number, flags, 0, dim, rows, tail_bytes, fingerprint)
    checksum = _checksum(_HEADER.pack(*fields, 0), parts)
    return b"".join((_HEADER.pack(*fields, checksum), *parts))


def _checksum(header: bytes, parts: tuple[bytes | memoryview, ...]) -> int:
    checksum = zlib.crc32(header[:-4])
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum
