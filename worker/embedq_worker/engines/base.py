"""Define the Engine protocol and the arrays that pass through it.

An engine turns token batches into vectors. This module imports no runtime and no tokenizer
library, so that packing and the stub engine need neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from embedq.protocol.contract import Device, Precision

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

#: Width of the smallest bucket, in tokens.
MIN_BUCKET: Final = 16

#: Width of the narrowest row that several texts share, in tokens. Attention costs the square of
#: the width, but narrower rows are hard to fill.
MIN_SHARED: Final = 64

#: Number of floats in one SIMD instruction of a CPU. OpenVINO computes the remainder of a row one
#: by one, so a width that is not a multiple of this is slow (see docs/benchmarks.md).
SIMD_WIDTH: Final = 16

#: Largest deviation from unit length that rounding to 16 bits explains (see docs/benchmarks.md).
#: A larger one is a fault and stays visible.
ROUNDING: Final = 1e-2

_FROM_FINE_TO_COARSE: Final = (Precision.F32, Precision.F16, Precision.BF16, Precision.INT8)

#: Inputs of the graph that differ between token batches; ``segments`` depends on the shape only.
CHANGING: Final = ("input_ids", "position_ids", "segment_ids")

#: All inputs of the graph.
INPUTS: Final = (*CHANGING, "segments")


@dataclass(frozen=True, slots=True)
class RaggedTokens:
    """The tokens of n texts, concatenated.

    Attributes:
        ids: tokens of all texts, special tokens included, int32 [total].
        offsets: text i owns ``ids[offsets[i]:offsets[i + 1]]``, int64 [n + 1].
        n_dropped: number of tokens of each text that did not fit, uint32 [n].
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    n_dropped: npt.NDArray[np.uint32]

    @classmethod
    def join(cls, parts: Sequence[RaggedTokens]) -> RaggedTokens:
        """Concatenate the texts of several parts."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
            np.cumsum(lengths, dtype=np.int64),
            np.concatenate([np.empty(0, np.uint32), *(part.n_dropped for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.n_dropped)

    def take(self, texts: npt.NDArray[np.intp]) -> RaggedTokens:
        """Copy the texts at these indexes, in this order, as `numpy.take` does."""
        lengths = self.lengths[texts]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        ids = self.ids[np.repeat(self.offsets[texts], lengths) + places]
        return RaggedTokens(ids, offsets, self.n_dropped[texts])

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Count the tokens of each text, int64 [n]."""
        return np.diff(self.offsets)


class AnyTokenizer(Protocol):
    """Interface that Tokenizer and StubTokenizer share."""

    max_length: int
    pad_id: int

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens: ...


class Engine(Protocol):
    """One model on one device, ready to infer.

    Attributes:
        name: runtime of the model: ``onnxruntime``, ``openvino`` or ``stub``.
        device: device that computes.
        precision: arithmetic of the device, or how the weights are stored if that is less precise.
        dim: components of a vector.
        concurrency: number of concurrent calls of ``infer`` that use the device fully.
        row_spec: shape of the token batches that ``infer`` accepts.
        details: further facts for operators, by name.
    """

    name: str
    device: Device
    precision: Precision
    dim: int
    concurrency: int
    row_spec: RowSpec
    details: Mapping[str, str]

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Compute the vectors of one token batch, float32 [B, S, D].

        Blocks; may be called from any thread.

        Raises:
            InferFailed: the inference failed.
            DeviceLost: only a new process can use the device again.
        """
        ...

    def close(self) -> None:
        """Release the device; the engine cannot be used afterwards."""
        ...


class RowFormat(StrEnum):
    """Arrangement of texts in the rows of a token batch."""

    PADDED = "padded"
    SHARED = "shared"
    PACKED = "packed"
    BUCKETS = "buckets"


@dataclass(frozen=True, slots=True)
class RowSpec:
    """Shape of the token batches that an engine accepts.

    Attributes:
        format: ``padded``, [B, T] of any size with one text per row; ``shared``, the same, and
            rows of some widths may hold several texts; ``packed``, one row [1, T] with several
            texts; ``buckets``, one row [1, T] with one text.
        widths: permitted row widths T in tokens, ascending; for ``shared`` those of a row that
            holds several texts; empty for ``padded``.
    """

    format: RowFormat = RowFormat.PADDED
    widths: tuple[int, ...] = ()

    @classmethod
    def shared(cls, max_length: int) -> RowSpec:
        """Describe shared rows: powers of two up to a width that fits the longest text."""
        longest = round_up_to_simd(max_length)
        return cls(RowFormat.SHARED, (*_powers_of_two(MIN_SHARED, longest), longest))

    @classmethod
    def packed(cls, width: int) -> RowSpec:
        """Describe packed rows of this many tokens."""
        return cls(RowFormat.PACKED, (width,))

    @classmethod
    def buckets(cls, max_length: int) -> RowSpec:
        """Describe rows of one text, padded to a power of two or to the longest text."""
        return cls(RowFormat.BUCKETS, (*_powers_of_two(MIN_BUCKET, max_length), max_length))

    @property
    def is_static(self) -> bool:
        """Say whether every token batch has one of a few compiled shapes."""
        return self.format in (RowFormat.PACKED, RowFormat.BUCKETS)

    def segments(self, width: int) -> int:
        """Return the maximum number of texts in a row; each text has at least two tokens."""
        return max(1, width // 2) if self.format in (RowFormat.PACKED, RowFormat.SHARED) else 1

    def width_for(self, n_tokens: int) -> int:
        """Return the smallest width that fits this many tokens."""
        return next(width for width in self.widths if width >= n_tokens)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows of one inference, each with up to S texts one after the other.

    Attributes:
        input_ids: tokens, int64 [B, T].
        position_ids: position of each token in its own text, int64 [B, T].
        segment_ids: 0 for padding, 1.. for the segment that a token belongs to, int64 [B, T].
        segments: the numbers 1..S, int64 [S].
        members: index of the text of each segment, -1 for none, int64 [B, S].
    """

    input_ids: Ints
    position_ids: Ints
    segment_ids: Ints
    segments: Ints
    members: Ints

    @classmethod
    def one_text(cls, width: int, row_spec: RowSpec) -> TokenBatch:
        """Build a row [1, width] filled by one text of zeros, to warm up a request."""
        members = np.full((1, row_spec.segments(width)), -1, np.int64)
        members[0, 0] = 0
        return cls(
            input_ids=np.zeros((1, width), np.int64),
            position_ids=np.arange(width, dtype=np.int64)[None],
            segment_ids=np.ones((1, width), np.int64),
            segments=np.arange(1, row_spec.segments(width) + 1, dtype=np.int64),
            members=members,
        )

    @property
    def n_texts(self) -> int:
        """Count the texts in the batch."""
        return int(np.count_nonzero(self.members >= 0))


def coarser(computed: Precision, stored: Precision) -> Precision:
    """Return the less precise of two: the arithmetic of a device, and how weights are stored."""
    return max(computed, stored, key=_FROM_FINE_TO_COARSE.index)


def round_up_to_simd(width: int) -> int:
    """Round a width up to a multiple of SIMD_WIDTH."""
    return -(-width // SIMD_WIDTH) * SIMD_WIDTH


def correct_rounding(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normalize vectors [B, D] in f32 if their length is 1 except for rounding; leave others.

    A graph that normalizes in 16 bits returns lengths that are off by the rounding error, and so
    is every dot product that a user reads as a cosine.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    lengths[np.abs(lengths - 1) > ROUNDING] = 1
    scaled: npt.NDArray[np.float32] = vectors / lengths
    return scaled


def _powers_of_two(first: int, limit: int) -> list[int]:
    widths = []
    while first < limit:
        widths.append(first)
        first *= 2
    return widths
