"""The value that holds vectors in Redis: a 32-byte header, raw little-endian rows, their outcomes.

One batch is stored as a few values, each sized to fill what the allocator hands out.
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
#: Bytes that Redis puts around a string of this size in the same allocation (sds header and NUL).
_SDS_BYTES: Final = 10
#: Share of an allocation that may stay empty before a value is cut shorter instead.
_MAX_SLACK: Final = 0.02
#: Bytes below which cutting costs more in keys than it saves in slack.
_MIN_CUT_BYTES: Final = 16 * 1024


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
    """Cut n rows into values that leave almost nothing of their allocations empty.

    Redis stores a string in the next size class of jemalloc, four per doubling, so a value just
    above one wastes up to a fifth. Each piece is as large as fits; a remainder that would waste
    more than two in a hundred is cut to fill the class below.

    Yields:
        (start, stop) of each value.
    """
    per_row = ITEM_BYTES[dtype] * dim + 10
    fixed = _HEADER.size + _SDS_BYTES + 64
    most = max(1, (MAX_VALUE_BYTES - fixed) // per_row)
    start = 0
    while start < n:
        rows = min(n - start, most)
        while rows > 1:
            size = fixed + rows * per_row
            upper, lower = _size_classes(size)
            if upper - size <= _MAX_SLACK * upper or lower < _MIN_CUT_BYTES:
                break
            rows = (lower - fixed) // per_row
        yield start, start + rows
        start += rows


def _size_classes(size: int) -> tuple[int, int]:
    """Return the smallest jemalloc class that holds size, and the one below it."""
    spacing = max(16, 1 << max(0, (size - 1).bit_length() - 3))
    upper = -(-size // spacing) * spacing
    below = upper - 1
    spacing = max(16, 1 << max(0, (below - 1).bit_length() - 3))
    return upper, below // spacing * spacing


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
