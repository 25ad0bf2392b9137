"""The Engine protocol and what it takes.

What a tokenizer gives, without one: the stub and the packing need no tokenizer's library.

What every engine offers: token batches in, vectors out. No runtime is imported here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from embedq.protocol.contract import Device, Precision


@dataclass(frozen=True, slots=True)
class RaggedTokens:
    """The tokens of n texts, one after the other.

    Attributes:
        ids: tokens of all texts, special tokens included, int32 [total].
        offsets: text i owns ``ids[offsets[i]:offsets[i + 1]]``, int64 [n + 1].
        n_dropped: tokens of each text that did not fit, uint32 [n].
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    n_dropped: npt.NDArray[np.uint32]

    @classmethod
    def join(cls, parts: Sequence[RaggedTokens]) -> RaggedTokens:
        """Put the texts of several parts one after the other."""
        lengths = np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])
        return cls(
            np.concatenate([np.empty(0, np.int32), *(part.ids for part in parts)]),
            np.cumsum(lengths, dtype=np.int64),
            np.concatenate([np.empty(0, np.uint32), *(part.n_dropped for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.n_dropped)

    def take(self, texts: npt.NDArray[np.intp]) -> RaggedTokens:
        """Copy some of the texts, in the order asked for."""
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
    """What Tokenizer and StubTokenizer have in common."""

    max_length: int
    pad_id: int

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens: ...


class Engine(Protocol):
    """One model on one device, ready to infer.

    Attributes:
        name: what runs the model: ``onnxruntime``, ``openvino`` or ``stub``.
        device: what it runs on.
        precision: the arithmetic it uses.
        dim: components of a vector.
        concurrency: how many callers of ``infer`` it serves well at once.
        form: the token batches it takes.
        details: what else an operator may want to know of it, by name.
    """

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> Device: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def dim(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def form(self) -> RowSpec: ...
    @property
    def details(self) -> Mapping[str, str]: ...

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Turn one token batch into vectors, float32 [B, S, D]; blocks, and any thread may call.

        Raises:
            InferFailed: the inference raised.
            DeviceLost: only a new process can use the device again.
        """
        ...

    def close(self) -> None:
        """Give the device back; the engine cannot be used afterwards."""
        ...


def available_cores() -> int:
    """Count the cores this process may use; macOS has no affinity to ask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


Ints = npt.NDArray[np.int64]


#: Tokens of the smallest bucket; a foreign model that needs less than these is not worth a shape.
MIN_BUCKET: Final = 16


#: Tokens of the narrowest row that texts share. Attention costs the square of the width, and a
#: narrower row is hard to fill: 32 won nothing for docstrings, 1 to 3 % for titles (2026-11-27).
MIN_SHARED: Final = 64


#: Numbers that one instruction of a CPU takes: OpenVINO works through what is left of a row after
#: these one by one. Attention over 9 rows of 60 tokens took 2.8 times as long in bf16, and 1.9
#: times in f32, as over 8 of 64 (2026.4 on Zen 5, 2026-11-27).
SIMD_WIDTH: Final = 16


class RowFormat(StrEnum):
    """How texts lie in token batches."""

    PADDED = "padded"
    SHARED = "shared"
    PACKED = "packed"
    BUCKETS = "buckets"


@dataclass(frozen=True, slots=True)
class RowSpec:
    """The token batches that an engine takes.

    Attributes:
        form: ``padded``, [B, T] of any size with one text a row; ``shared``, the same, and rows of
            some widths may hold several texts; ``packed``, one row [1, T] with several texts;
            ``buckets``, one row [1, T] with one text.
        widths: the tokens T that a row may have, rising; for ``shared`` those of a row that holds
            several texts; empty for ``padded``.
    """

    form: RowFormat = RowFormat.PADDED
    widths: tuple[int, ...] = ()

    @classmethod
    def shared(cls, max_length: int) -> RowSpec:
        """Describe rows that texts share: powers of two up to what takes the longest text."""
        longest = round_up_to_simd(max_length)
        widths = []
        width = MIN_SHARED
        while width < longest:
            widths.append(width)
            width *= 2
        return cls(RowFormat.SHARED, (*widths, longest))

    @classmethod
    def packed(cls, width: int) -> RowSpec:
        """Describe packed rows of this many tokens."""
        return cls(RowFormat.PACKED, (width,))

    @classmethod
    def buckets(cls, max_length: int) -> RowSpec:
        """Describe rows of one text, padded to a power of two or to the longest text there is."""
        widths = []
        width = MIN_BUCKET
        while width < max_length:
            widths.append(width)
            width *= 2
        return cls(RowFormat.BUCKETS, (*widths, max_length))

    @property
    def is_static(self) -> bool:
        """Say whether every token batch has one of a few shapes."""
        return self.form in (RowFormat.PACKED, RowFormat.BUCKETS)

    def segments(self, width: int) -> int:
        """Return how many texts a row of this width has room for: each has two tokens or more."""
        return max(1, width // 2) if self.form in (RowFormat.PACKED, RowFormat.SHARED) else 1

    def width_for(self, n_tokens: int) -> int:
        """Return the smallest width that takes this many tokens."""
        return next(width for width in self.widths if width >= n_tokens)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Rows for one forward pass, each with up to S texts one after the other.

    Attributes:
        input_ids: tokens, int64 [B, T].
        position_ids: place of each token in its own text, int64 [B, T].
        segment_ids: 0 for padding, 1.. for the segment that a token belongs to, int64 [B, T].
        segments: the numbers 1..S, int64 [S].
        members: which text each segment is, -1 for none, int64 [B, S].
    """

    input_ids: Ints
    position_ids: Ints
    segment_ids: Ints
    segments: Ints
    members: Ints

    @classmethod
    def one_text(cls, width: int, form: RowSpec) -> TokenBatch:
        """Build a row [1, width] that one text of zeros fills, to warm a request up."""
        members = np.full((1, form.segments(width)), -1, np.int64)
        members[0, 0] = 0
        return cls(
            input_ids=np.zeros((1, width), np.int64),
            position_ids=np.arange(width, dtype=np.int64)[None],
            segment_ids=np.ones((1, width), np.int64),
            segments=np.arange(1, form.segments(width) + 1, dtype=np.int64),
            members=members,
        )

    @property
    def n_texts(self) -> int:
        """Count the texts in the batch."""
        return int(np.count_nonzero(self.members >= 0))


def round_up_to_simd(width: int) -> int:
    """Return the next width that leaves nothing after whole LANES."""
    return -(-width // SIMD_WIDTH) * SIMD_WIDTH


#: Largest deviation from unit length that 16 bits explain (f16 5e-4, bf16 4e-3 were seen, see
#: docs/benchmarks.md). A larger one is a fault and is left visible.
ROUNDING: Final = 1e-2


def unit_lengths(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Normalize vectors [B, D] in f32 whose length is 1 but for rounding; leave all others.

    A graph that normalizes in 16 bits leaves lengths that are off by the rounding, and with them
    every dot product that a user takes for a cosine.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    lengths[np.abs(lengths - 1) > ROUNDING] = 1
    scaled: npt.NDArray[np.float32] = vectors / lengths
    return scaled
