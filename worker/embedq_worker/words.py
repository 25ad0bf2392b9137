"""Remembers what a tokenizer made of each word, where a text is no more than its words.

A BERT tokenizer treats what stands between two spaces or signs of ASCII by itself: cleaning, lower
case and accents never reach across them, and a sign is a word of its own. So its library is asked
once for such a word, and a text costs a search and a join.

Source: tokenizers, src/normalizers/bert.rs, src/pre_tokenizers/bert.rs, src/models/wordpiece.
"""

from __future__ import annotations

import re
import string
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

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
TOGETHER: Final = 64
BETWEEN: Final = ","

#: Gives the ids of each text.
Library = Callable[[Sequence[str]], Iterable[list[int]]]


class Words:
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
        self._between = ids[signs.index(BETWEEN)]
        self._signs = {"": b"", **dict(zip(signs, map(as_bytes, ids), strict=True))}
        self._known = dict(self._signs)
        self._bytes = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text, int32 as bytes: those that the library gives.

        Raises:
            Exception: whatever the library raises.
        """
        split = [self._split(text) for text in texts]
        ids_of = self._knowing(set().union(*split)).__getitem__
        return [b"".join(map(ids_of, words)) for words in split]

    def _split(self, text: str) -> list[str]:
        if len(text) > MOST_CHARACTERS or self._added.search(text):
            return [text]
        for split, spaced in SPLITS.items():
            if split in text:
                text = text.replace(split, spaced)
        return text.split(" ")

    def _knowing(self, words: set[str]) -> dict[str, bytes]:
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
        groups = [words[at : at + TOGETHER] for at in range(0, len(words), TOGETHER)]
        joined = self._library([BETWEEN.join(group) for group in groups])
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
