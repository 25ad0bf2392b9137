"""What a tokenizer gives, without one: the stub and the packing need no tokenizer's library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt


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
