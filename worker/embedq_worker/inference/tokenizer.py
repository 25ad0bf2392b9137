"""The only file that imports tokenizers; word cache.

Remembers what a tokenizer made of each word, where a text is no more than its words.

A BERT tokenizer treats what stands between two spaces or signs of ASCII by itself: cleaning, lower
case and accents never reach across them, and a sign is a word of its own. So its library is asked
once for such a word, and a text costs a search and a join.

Source: tokenizers, src/normalizers/bert.rs, src/pre_tokenizers/bert.rs, src/models/wordpiece.

Texts -> ragged tokens: one flat array of ids with offsets, and how many did not fit.

The only file that imports ``tokenizers``.
"""

from __future__ import annotations

import re
import string
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.errors import EngineError, ModelError

#: What a text is split at, and what is put in its place before it is. Only what is ASCII, which
#: Python and the library are sure to see alike.
SPLITS: Final = {sign: f" {sign} " for sign in string.punctuation} | dict.fromkeys("\t\n\r", " ")


#: What no word of a text that was split holds.
WHOLE: Final = re.compile(f"[ {re.escape(''.join(SPLITS))}]")


#: Characters of the longest text that is split; its words take a hundred bytes each for a moment.
MOST_CHARACTERS: Final = 64 * 1024


#: Bytes to remember, about. Then all is forgotten: the frequent words are soon back.
MOST_BYTES: Final = 16 * 1024 * 1024


#: Bytes of an entry, and of each of its characters with what comes of it.
ENTRY_BYTES: Final = 200


CHARACTER_BYTES: Final = 8


#: New words that the library is asked for as one text, and the sign between them: each by itself
#: takes twice as long.
GROUP_SIZE: Final = 64


SEPARATOR: Final = ","


#: Gives the ids of each text.
Library = Callable[[Sequence[str]], Iterable[list[int]]]


class WordCache:
    """The words met so far, with their ids; any thread may ask."""

    def __init__(self, library: Library, added: Iterable[str]) -> None:
        """Begin with the signs.

        Args:
            library: encodes any text.
            added: tokens that the library cuts out of a text before anything else, as ``[SEP]``.
        """
        self._library = library
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        signs = list(string.punctuation)
        ids = list(library(signs))
        self._between = ids[signs.index(SEPARATOR)]
        self._signs = {"": b"", **dict(zip(signs, map(as_bytes, ids), strict=True))}
        self._known = dict(self._signs)
        self._bytes = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text, int32 as bytes: those that the library gives.

        Raises:
            Exception: whatever the library raises.
        """
        split = [self._split(text) for text in texts]
        ids_of = self._ids_of(set().union(*split)).__getitem__
        return [b"".join(map(ids_of, words)) for words in split]

    def _split(self, text: str) -> list[str]:
        if len(text) > MOST_CHARACTERS or self._added.search(text):
            return [text]
        for split, spaced in SPLITS.items():
            if split in text:
                text = text.replace(split, spaced)
        return text.split(" ")

    def _ids_of(self, words: set[str]) -> dict[str, bytes]:
        """Return what is known, these words included."""
        known = self._known
        unknown = list(words.difference(known))
        if unknown:
            known.update(self._learn(unknown))
            self._bytes += ENTRY_BYTES * len(unknown) + CHARACTER_BYTES * sum(map(len, unknown))
            if self._bytes > MOST_BYTES:
                # A new one: whoever holds the old one may still look into it.
                self._known, self._bytes = dict(self._signs), 0
        return known

    def _learn(self, unknown: list[str]) -> Iterator[tuple[str, bytes]]:
        texts = [text for text in unknown if WHOLE.search(text)]
        words = [word for word in unknown if not WHOLE.search(word)]
        yield from zip(texts, map(as_bytes, self._library(texts)), strict=True)
        groups = [words[at : at + GROUP_SIZE] for at in range(0, len(words), GROUP_SIZE)]
        joined = self._library([SEPARATOR.join(group) for group in groups])
        for group, ids in zip(groups, joined, strict=True):
            parts = list(self._part(ids))
            if len(parts) != len(group):  # a word of theirs looks like the sign between them
                parts = list(self._library(group))
            yield from zip(group, map(as_bytes, parts), strict=True)

    def _part(self, ids: list[int]) -> Iterator[list[int]]:
        """Cut ids where the sign stood that was put between words."""
        start = 0
        for at, found in enumerate(ids):
            if [found] == self._between:
                yield ids[start:at]
                start = at + 1
        yield ids[start:]


def as_bytes(ids: list[int]) -> bytes:
    """Return ids as int32."""
    return array("i", ids).tobytes()


__all__ = ["RaggedTokens", "Tokenizer"]


#: Characters handed to the tokenizer in one call. It keeps 40 to 90 bytes per token until the
#: call returns: about 10 MB for a group, twice that for a single text of the largest size.
GROUP_CHARS: Final = 512 * 1024


#: Bytes of an id, an int32.
ID_BYTES: Final = 4


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
        prefix, suffix = _special_ids(self._tokenizer, path)
        self._room = max_length - len(prefix) - len(suffix)
        if self._room <= 0:
            raise ModelError(f"A length of {max_length} tokens leaves no room for a text: {path}.")
        self._prefix, self._suffix = as_bytes(prefix), as_bytes(suffix)
        self._words = None
        added = self._tokenizer.get_added_tokens_decoder().values()
        # Those that are normalized are looked for in what the normalizer left of a text.
        if _splits_into_words(self._tokenizer) and not any(one.normalized for one in added):
            self._words = WordCache(self._ask, [one.content for one in added])

    def require_below(self, limit: int) -> None:
        """Check that no token has this number or a greater one.

        OpenVINO looks up nothing for such a token, and says nothing.

        Raises:
            ModelError: one has.
        """
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        if largest >= limit:
            raise ModelError(
                f"tokenizer.json has a token {largest:,}, and the weights know {limit:,} tokens. "
                "Fetch both files again; tokens that were added need weights of their own."
            )

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens:
        """Tokenize the texts, keeping the first tokens of those that are too long.

        Args:
            texts: any number of them; memory beyond the ids is bounded.

        Raises:
            EngineError: the tokenizer failed; the message does not hold any text.
        """
        parts: list[bytes] = []
        lengths: list[int] = []
        dropped: list[int] = []
        room = self._room * ID_BYTES
        for group in _groups(texts):
            for ids in self._encode(group):
                kept = ids[:room]
                parts += (self._prefix, kept, self._suffix)
                lengths.append(len(kept))
                dropped.append(len(ids) - len(kept))
        sizes = np.array(lengths, np.int64) // ID_BYTES + (self.max_length - self._room)
        return RaggedTokens(
            np.frombuffer(b"".join(parts), np.int32),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
            np.array(dropped, np.uint32) // ID_BYTES,
        )

    def _encode(self, texts: Sequence[str]) -> Iterable[bytes]:
        try:
            if self._words:
                return self._words.encode(texts)
            return map(as_bytes, self._ask(texts))
        except Exception as error:
            # The cause may quote its input, so it is named and not chained.
            raise EngineError(
                f"The tokenizer failed on {len(texts):,} texts ({type(error).__name__})."
            ) from None

    def _ask(self, texts: Sequence[str]) -> Iterator[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)


def _splits_into_words(tokenizer: tokenizers.Tokenizer) -> bool:
    """Say whether no word of a text has to do with another, as Words wants it."""
    return (
        isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(tokenizer.model, models.WordPiece)
    )


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
