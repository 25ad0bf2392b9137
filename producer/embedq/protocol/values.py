"""The result of one batch: vectors and outcomes as bytes.

The value that holds vectors in Redis: a 32-byte header, raw little-endian rows, their outcomes.

One batch is stored as values of at most 256 KiB, each with as many rows as fit.

The outcomes of a batch as columns: 10 bytes a text on the wire instead of an object each.
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


TRUNCATED, REROUTED = 1, 2


#: Most kinds of outcomes in a batch: each is a number of one byte.
MAX_KINDS = 256


@dataclass(frozen=True, slots=True)
class OutcomeTable:
    """One outcome per text, stored by column.

    Attributes:
        kinds: the distinct (status, device, precision, code) of the batch, at most 256.
        kind: uint8 [n], index into kinds.
        flags: uint8 [n], sum of TRUNCATED and REROUTED.
        n_tokens: uint32 [n], tokens embedded, special tokens included.
        n_dropped: uint32 [n], tokens that did not fit.
    """

    kinds: Sequence[tuple[str, str, str, str]]
    kind: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.uint8]
    n_tokens: npt.NDArray[np.uint32]
    n_dropped: npt.NDArray[np.uint32]

    @classmethod
    def from_outcomes(cls, outcomes: Sequence[Outcome]) -> OutcomeTable:
        """Turn outcome objects into columns."""
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
        """Yield what `asdict` would give of each outcome, at a tenth of its price."""
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
        """Count the texts that have no vector."""
        return sum(n for kind, n in self.count_kinds() if kind[0] != Status.OK)

    def count_kinds(self) -> Iterator[tuple[tuple[str, str, str, str], int]]:
        """Yield each kind with the number of its texts."""
        counts = np.bincount(self.kind, minlength=len(self.kinds))
        return zip(self.kinds, counts.tolist(), strict=True)

    def count_flag(self, flag: int) -> int:
        """Count the texts that carry TRUNCATED or REROUTED."""
        return int(np.count_nonzero(self.flags & flag))

    def rows(self, start: int, stop: int) -> OutcomeTable:
        """Return the outcomes of rows start to stop, sharing their memory."""
        return OutcomeTable(
            self.kinds,
            self.kind[start:stop],
            self.flags[start:stop],
            self.n_tokens[start:stop],
            self.n_dropped[start:stop],
        )

    @classmethod
    def concatenate(cls, tables: Sequence[OutcomeTable]) -> OutcomeTable:
        """Join tables end to end.

        Raises:
            CorruptValue: together they have more kinds than a worker ever gives.
        """
        kinds: dict[tuple[str, str, str, str], int] = {}
        renumbered = []
        for table in tables:
            numbers = [kinds.setdefault(kind, len(kinds)) for kind in table.kinds]
            if len(kinds) > MAX_KINDS:
                raise CorruptValue(f"The outcomes of a batch are of {len(kinds)} kinds or more.")
            renumbered.append(np.array(numbers, np.uint8)[table.kind])
        return cls(
            list(kinds),
            np.concatenate(renumbered),
            np.concatenate([table.flags for table in tables]),
            np.concatenate([table.n_tokens for table in tables]),
            np.concatenate([table.n_dropped for table in tables]),
        )

    def to_bytes(self) -> bytes:
        """Encode as a length, the kinds in msgpack, then the columns, little endian."""
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
            CorruptValue: the bytes do not hold n outcomes.
        """
        try:
            (size,) = struct.unpack_from("<I", raw)
            kinds = [_kind(*kind) for kind in msgpack.unpackb(raw[4 : 4 + size])]
            at = 4 + size
            kind, flags = (np.frombuffer(raw, np.uint8, n, at + n * i) for i in range(2))
            n_tokens, n_dropped = (
                np.frombuffer(raw, "<u4", n, at + 2 * n + 4 * n * i) for i in range(2)
            )
            if n and int(kind.max()) >= len(kinds):
                raise ValueError("kind out of range")
        except (struct.error, ValueError, TypeError, msgpack.UnpackException) as error:
            raise CorruptValue(f"The outcomes of {n:,} texts are unreadable.") from error
        return cls(kinds, kind, flags, n_tokens, n_dropped)


def _kind(status: str, device: str, precision: str, code: str) -> tuple[str, str, str, str]:
    return str(Status(status)), str(device), str(precision), str(code)
