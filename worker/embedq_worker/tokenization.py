"""Texts -> ragged tokens: one flat array of ids with offsets, and how many did not fit.

The only file that imports ``tokenizers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import tokenizers

from embedq_worker.errors import EngineError, ModelError
from embedq_worker.tokens import RaggedTokens

__all__ = ["RaggedTokens", "Tokenizer"]

#: Characters handed to the tokenizer in one call. It keeps 40 to 90 bytes per token until the
#: call returns: about 10 MB for a group, twice that for a single text of the largest size.
GROUP_CHARS: Final = 512 * 1024


class Tokenizer:
    """A model's tokenizer with its length limit applied here, so that dropped tokens are counted.

    Attributes:
        max_length: tokens the model takes, special tokens included.
        pad_id: token that fills a row.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        """Load tokenizer.json.

        Raises:
            ModelError: the file is damaged, or its special tokens leave no room for a text.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(
                f"{path} is not a readable tokenizer ({error}). Fetch the file again."
            ) from error
        padding = self._tokenizer.padding
        self.max_length = max_length
        self.pad_id = _pad_id(self._tokenizer, padding)
        # The file of all-MiniLM-L6-v2 arrives with truncation to 128 and padding to 128, while the
        # model was trained and is published with 256; other loaders stumble over this.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._prefix, self._suffix = _special_ids(self._tokenizer, path)
        if max_length <= len(self._prefix) + len(self._suffix):
            raise ModelError(f"A length of {max_length} tokens leaves no room for a text: {path}.")

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens:
        """Tokenize the texts, keeping the first tokens of those that are too long.

        Args:
            texts: any number of them; memory beyond the ids is bounded.

        Raises:
            EngineError: the tokenizer failed; the message does not hold any text.
        """
        room = self.max_length - len(self._prefix) - len(self._suffix)
        parts: list[npt.NDArray[np.int32]] = []
        lengths: list[int] = []
        dropped: list[int] = []
        for group in _groups(texts):
            flat: list[int] = []
            for ids in self._encode(group):
                kept = len(ids) if len(ids) <= room else room
                flat += self._prefix
                flat += ids if kept == len(ids) else ids[:room]
                flat += self._suffix
                lengths.append(len(self._prefix) + kept + len(self._suffix))
                dropped.append(len(ids) - kept)
            parts.append(np.array(flat, np.int32))
        return RaggedTokens(
            np.concatenate(parts) if parts else np.empty(0, np.int32),
            np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            np.array(dropped, np.uint32),
        )

    def _encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:
            # The cause may quote its input, so it is named and not chained.
            raise EngineError(
                f"The tokenizer failed on {len(texts):,} texts ({type(error).__name__})."
            ) from None
        return (encoding.ids for encoding in encodings)


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split the texts so that a group holds GROUP_CHARS characters or a single longer text."""
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > GROUP_CHARS:
            yield texts[start:index]
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def _special_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    """Find which tokens the template puts before and after a text."""
    whole = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    raise ModelError(f"{path} does not wrap a text in fixed special tokens; it cannot be used.")


def _pad_id(tokenizer: tokenizers.Tokenizer, padding: dict[str, int] | None) -> int:
    if padding:
        return int(padding["pad_id"])
    for token in ("[PAD]", "<pad>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    return 0
