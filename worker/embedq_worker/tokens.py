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

    def __len__(self) -> int:
        return len(self.n_dropped)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Count the tokens of each text, int64 [n]."""
        return np.diff(self.offsets)


class AnyTokenizer(Protocol):
    """What Tokenizer and StubTokenizer have in common."""

    max_length: int
    pad_id: int

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens: ...
