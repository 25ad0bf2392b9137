"""Encodes and decodes the vectors and outcomes of a batch.

A batch is stored in Redis as values of at most 256 KiB. A value consists of a 32-byte header, some
rows of vectors (little endian), and the outcomes of these rows, stored by column.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import msgpack
import numpy as np
import numpy.typing as npt

from embedq.errors import CorruptValue
from embedq.protocol.contract import Dtype, Outcome, Status

#: Vectors [n, D]; float32, or float16 if the job's dtype is float16.
Vectors = npt.NDArray[np.float32]

_MAGIC: Final = b"EQV1"

#: Magic, dtype, flags, reserved, dim, rows, bytes of outcomes, fingerprint, crc32 of the value.
_HEADER: Final = struct.Struct("<4sBBHIII8sI")

#: Dtype -> code in the header.
_DTYPE_CODES: Final = {Dtype.FLOAT32: 1, Dtype.FLOAT16: 2}

#: Dtype -> type description of numpy, little endian.
NUMPY_DTYPES: Final = {Dtype.FLOAT32: "<f4", Dtype.FLOAT16: "<f2"}

#: Dtype -> size of a component, bytes.
ITEM_BYTES: Final = {Dtype.FLOAT32: 4, Dtype.FLOAT16: 2}

#: Header flag of a value that says why the whole batch failed.
_BATCH_FAILED: Final = 1

#: Maximum size of a value, bytes; a batch then has few values, and a reader needs little memory.
MAX_VALUE_BYTES: Final = 256 * 1024

#: Size of the outcome of one row, bytes.
_OUTCOME_BYTES: Final = 10

#: Space reserved in a value for the distinct kinds of its outcomes, bytes.
_KINDS_BYTES: Final = 74


@dataclass(frozen=True, slots=True)
class Value:
    """Decoded value: some rows of a batch, or the reason why the whole batch failed.

    Attributes:
        vectors: float32 or float16 [rows, D]; NaN for failed texts.
        outcomes: one outcome per row.
        failure: (code, detail) if the whole batch failed; then there are no rows.
    """

    vectors: Vectors
    outcomes: OutcomeTable
    failure: tuple[str, str] | None = None


def encode(
    vectors: Vectors, outcomes: OutcomeTable, fingerprint: bytes, dtype: Dtype = Dtype.FLOAT32
) -> bytes:
    """Encode rows and their outcomes as one value.

    Args:
        vectors: float32 [n, D].
        outcomes: n outcomes.
        fingerprint: fingerprint of the vector specification, 8 bytes.
        dtype: stored type. float16 changes a component of a unit vector by at most 2**-12, and
            the cosine of two unit vectors by less than 2**-10 (IEEE 754: 11 bits).
    """
    rows, dim = vectors.shape
    body = np.ascontiguousarray(vectors, NUMPY_DTYPES[dtype]).data.cast("B") if rows else b""
    return _assemble(dtype, 0, dim, rows, fingerprint, body, outcomes.to_bytes())


def encode_failure(code: str, detail: str) -> bytes:
    """Encode the reason why a whole batch failed; the value has no fingerprint."""
    tail = f"{code}\n{detail}".encode()[:4096]
    return _assemble(Dtype.FLOAT32, _BATCH_FAILED, 0, 0, bytes(8), b"", tail)


def decode(value: bytes, fingerprint: bytes) -> Value:
    """Check and decode one value; the vectors share its memory and are read-only.

    Raises:
        CorruptValue: the size, checksum, dtype or fingerprint is wrong.
    """
    if len(value) < _HEADER.size:
        raise CorruptValue(
            f"A value of {len(value)} bytes is shorter than the header of {_HEADER.size} bytes."
        )
    header = _HEADER.unpack_from(value)
    magic, dtype_code, flags, _, dim, rows, tail_bytes, stored, checksum = header
    dtype = next((name for name, code in _DTYPE_CODES.items() if code == dtype_code), Dtype.FLOAT32)
    size = _HEADER.size + ITEM_BYTES[dtype] * dim * rows + tail_bytes
    if magic != _MAGIC or dtype_code != _DTYPE_CODES[dtype] or size != len(value):
        raise CorruptValue(f"A value of {len(value):,} bytes does not match its header.")
    head, rest = value[: _HEADER.size], memoryview(value)[_HEADER.size :]
    if _checksum(head, rest) != checksum:
        raise CorruptValue(f"A value of {len(value):,} bytes fails its checksum.")
    # A failure has no fingerprint: perhaps the worker could not decode the specification.
    if stored != fingerprint and not flags & _BATCH_FAILED:
        raise CorruptValue(
            f"A value has the fingerprint {stored.hex()}, expected {fingerprint.hex()}."
        )
    vectors = np.frombuffer(rest, NUMPY_DTYPES[dtype], rows * dim).reshape(rows, dim)
    tail = rest[len(rest) - tail_bytes :]
    if flags & _BATCH_FAILED:
        code, _, detail = bytes(tail).decode(errors="replace").partition("\n")
        return Value(vectors, OutcomeTable.from_outcomes([]), (code, detail))
    return Value(vectors, OutcomeTable.from_bytes(tail, rows))


def split_rows(n: int, dim: int, dtype: Dtype = Dtype.FLOAT32) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each value of n rows; each has at most MAX_VALUE_BYTES."""
    per_row = ITEM_BYTES[dtype] * dim + _OUTCOME_BYTES
    max_rows = max(1, (MAX_VALUE_BYTES - _HEADER.size - _KINDS_BYTES) // per_row)
    for start in range(0, n, max_rows):
        yield start, min(start + max_rows, n)


def _assemble(
    dtype: Dtype, flags: int, dim: int, rows: int, fingerprint: bytes, *parts: bytes | memoryview
) -> bytes:
    # The last part is the outcomes or the failure.
    fields = (_MAGIC, _DTYPE_CODES[dtype], flags, 0, dim, rows, len(parts[-1]), fingerprint)
    checksum = _checksum(_HEADER.pack(*fields, 0), *parts)
    return b"".join((_HEADER.pack(*fields, checksum), *parts))


def _checksum(header: bytes, *parts: bytes | memoryview) -> int:
    checksum = zlib.crc32(header[:-4])  # without the checksum itself
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


#: Flags of an outcome.
TRUNCATED, REROUTED = 1, 2

#: Maximum number of kinds of outcomes in a batch; the index of a kind is stored in one byte.
MAX_KINDS = 256


@dataclass(frozen=True, slots=True)
class OutcomeTable:
    """One outcome per text, stored by column.

    Attributes:
        kinds: distinct (status, device, precision, code) of the batch, at most MAX_KINDS.
        kind: uint8 [n], index into kinds.
        flags: uint8 [n], bits TRUNCATED and REROUTED.
        n_tokens: uint32 [n], number of embedded tokens, special tokens included.
        n_dropped: uint32 [n], number of tokens that did not fit.
    """

    kinds: Sequence[tuple[str, str, str, str]]
    kind: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    n_tokens: npt.NDArray[np.uint32]
    n_dropped: npt.NDArray[np.uint32]

    @classmethod
    def from_outcomes(cls, outcomes: Sequence[Outcome]) -> OutcomeTable:
        """Build the table from outcome objects."""
        kinds: dict[tuple[str, str, str, str], int] = {}
        kind = [
            kinds.setdefault((str(o.status), o.device, o.precision, o.code), len(kinds))
            for o in outcomes
        ]
        flags = [TRUNCATED * o.truncated + REROUTED * o.rerouted for o in outcomes]
        return cls(
            list(kinds),
            np.array(kind, np.uint8),
            np.array(flags, np.uint8),
            np.array([o.n_tokens for o in outcomes], np.uint32),
            np.array([o.n_tokens_dropped for o in outcomes], np.uint32),
        )

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, row: int) -> Outcome:
        status, device, precision, code = self.kinds[int(self.kind[row])]
        flags = int(self.flags[row])
        return Outcome(
            status=Status(status),
            truncated=bool(flags & TRUNCATED),
            rerouted=bool(flags & REROUTED),
            n_tokens=int(self.n_tokens[row]),
            n_tokens_dropped=int(self.n_dropped[row]),
            device=device,
            precision=precision,
            code=code,
        )

    def __iter__(self) -> Iterator[Outcome]:
        return (self[row] for row in range(len(self)))

    def as_dicts(self) -> Iterator[dict[str, str | bool | int]]:
        """Yield each outcome as a dict, without creating an Outcome."""
        columns = (self.kind, self.flags, self.n_tokens, self.n_dropped)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for kind, flags, n_tokens, n_dropped in rows:
            status, device, precision, code = self.kinds[kind]
            yield {
                "status": status,
                "truncated": bool(flags & TRUNCATED),
                "rerouted": bool(flags & REROUTED),
                "n_tokens": n_tokens,
                "n_tokens_dropped": n_dropped,
                "device": device,
                "precision": precision,
                "code": code,
            }

    def count_failed(self) -> int:
        """Return the number of failed texts."""
        return sum(n for kind, n in self.count_kinds() if kind[0] != Status.OK)

    def count_kinds(self) -> Iterator[tuple[tuple[str, str, str, str], int]]:
        """Yield each kind and its number of texts."""
        counts = np.bincount(self.kind, minlength=len(self.kinds))
        return zip(self.kinds, counts.tolist(), strict=True)

    def count_flag(self, flag: int) -> int:
        """Return the number of texts with the flag TRUNCATED or REROUTED."""
        return int(np.count_nonzero(self.flags & flag))

    def rows(self, start: int, stop: int) -> OutcomeTable:
        """Return the outcomes of rows start to stop; they share memory with this table."""
        return OutcomeTable(
            self.kinds,
            self.kind[start:stop],
            self.flags[start:stop],
            self.n_tokens[start:stop],
            self.n_dropped[start:stop],
        )

    @classmethod
    def concatenate(cls, tables: Sequence[OutcomeTable]) -> OutcomeTable:
        """Concatenate tables.

        Raises:
            CorruptValue: the tables have more than MAX_KINDS kinds.
        """
        kinds: dict[tuple[str, str, str, str], int] = {}
        renumbered = []
        for table in tables:
            numbers = [kinds.setdefault(kind, len(kinds)) for kind in table.kinds]
            if len(kinds) > MAX_KINDS:
                raise CorruptValue(
                    f"A batch has {len(kinds)} kinds of outcomes; the limit is {MAX_KINDS}."
                )
            renumbered.append(np.array(numbers, np.uint8)[table.kind])
        return cls(
            list(kinds),
            np.concatenate(renumbered),
            np.concatenate([table.flags for table in tables]),
            np.concatenate([table.n_tokens for table in tables]),
            np.concatenate([table.n_dropped for table in tables]),
        )

    def to_bytes(self) -> bytes:
        """Encode as length of the kinds, kinds in msgpack, then columns, little endian."""
        kinds: bytes = msgpack.packb(list(self.kinds))
        return b"".join(
            (
                struct.pack("<I", len(kinds)),
                kinds,
                self.kind.tobytes(),
                self.flags.tobytes(),
                self.n_tokens.astype("<u4", copy=False).tobytes(),
                self.n_dropped.astype("<u4", copy=False).tobytes(),
            )
        )

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview, n: int) -> OutcomeTable:
        """Decode the outcomes of n texts.

        Raises:
            CorruptValue: the bytes are not n outcomes.
        """
        try:
            (size,) = struct.unpack_from("<I", raw)
            kinds = [
                (str(Status(status)), str(device), str(precision), str(code))
                for status, device, precision, code in msgpack.unpackb(raw[4 : 4 + size])
            ]
            at = 4 + size
            kind, flags = (np.frombuffer(raw, np.uint8, n, at + n * i) for i in range(2))
            n_tokens, n_dropped = (
                np.frombuffer(raw, "<u4", n, at + 2 * n + 4 * n * i) for i in range(2)
            )
            if n and int(kind.max()) >= len(kinds):
                raise ValueError("kind out of range")
        except (struct.error, ValueError, TypeError, msgpack.UnpackException) as error:
            raise CorruptValue(f"The outcomes of {n:,} texts cannot be decoded.") from error
        return cls(kinds, kind, flags, n_tokens, n_dropped)
