"""Tokenize texts into ragged tokens; the only module that imports ``tokenizers``.

A BERT tokenizer treats every word between spaces and ASCII punctuation independently: cleaning,
lowercasing and accent stripping never cross these. So the library tokenizes each such word once,
the word cache stores its ids, and a text costs a lookup and a join.

Source: tokenizers, src/normalizers/bert.rs, src/pre_tokenizers/bert.rs, src/models/wordpiece.
"""

from __future__ import annotations

import json
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
from embedq_worker.model.tokenizer_config import ADDED_FLAGS, TokenizerConfig

#: Replacements before a text is split at spaces: spaces around punctuation, and one for white
#: space. ASCII only, which Python and the library surely classify alike.
SPLITS: Final = {mark: f" {mark} " for mark in string.punctuation} | dict.fromkeys("\t\n\r", " ")

#: Matches a text that was not split, because it contains a character at which texts are split.
WHOLE: Final = re.compile(f"[ {re.escape(''.join(SPLITS))}]")

#: Length of the longest text that is split, in characters; each word takes 100 bytes meanwhile.
MAX_CHARACTERS: Final = 64 * 1024

#: Approximate size of the word cache, bytes. A full cache is emptied: frequent words soon return.
MAX_CACHE_BYTES: Final = 16 * 1024 * 1024

#: Approximate size of a cache entry without its word and ids, bytes.
ENTRY_BYTES: Final = 200

#: Approximate size of word and ids per character of the word, bytes.
CHARACTER_BYTES: Final = 8

#: Number of new words that are joined into one text for the library, which halves the time.
GROUP_SIZE: Final = 64

#: Mark between joined words.
SEPARATOR: Final = ","

#: Function that returns the ids of each text.
Library = Callable[[Sequence[str]], Iterable[list[int]]]


class WordCache:
    """Ids of the words seen so far; may be called from any thread."""

    def __init__(self, library: Library, added: Iterable[str]) -> None:
        """Fill the cache with the ids of punctuation.

        Args:
            library: encodes any text.
            added: tokens such as ``[SEP]``, which the library finds before it splits into words.
        """
        self._library = library
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        marks = list(string.punctuation)
        ids = list(library(marks))
        self._separator = ids[marks.index(SEPARATOR)]
        self._punctuation = {"": b"", **dict(zip(marks, map(as_bytes, ids), strict=True))}
        self._cached = dict(self._punctuation)
        self._bytes = 0

    def encode(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of each text as the library does, int32 as bytes.

        Raises:
            Exception: the library failed.
        """
        split = [self._split(text) for text in texts]
        ids_of = self._ids_of(set().union(*split)).__getitem__
        return [b"".join(map(ids_of, words)) for words in split]

    def _split(self, text: str) -> list[str]:
        if len(text) > MAX_CHARACTERS or self._added.search(text):
            return [text]
        for split, spaced in SPLITS.items():
            if split in text:
                text = text.replace(split, spaced)
        return text.split(" ")

    def _ids_of(self, words: set[str]) -> dict[str, bytes]:
        cached = self._cached
        new = list(words.difference(cached))
        if new:
            cached.update(self._encode_words(new))
            self._bytes += ENTRY_BYTES * len(new) + CHARACTER_BYTES * sum(map(len, new))
            if self._bytes > MAX_CACHE_BYTES:
                # A new dict, because other threads may still read the old one.
                self._cached, self._bytes = dict(self._punctuation), 0
        return cached

    def _encode_words(self, new: list[str]) -> Iterator[tuple[str, bytes]]:
        texts = [text for text in new if WHOLE.search(text)]
        words = [word for word in new if not WHOLE.search(word)]
        yield from zip(texts, map(as_bytes, self._library(texts)), strict=True)
        groups = [words[at : at + GROUP_SIZE] for at in range(0, len(words), GROUP_SIZE)]
        joined = self._library([SEPARATOR.join(group) for group in groups])
        for group, ids in zip(groups, joined, strict=True):
            parts = list(self._split_ids(ids))
            if len(parts) != len(group):  # a word contains the separator's id
                parts = list(self._library(group))
            yield from zip(group, map(as_bytes, parts), strict=True)

    def _split_ids(self, ids: list[int]) -> Iterator[list[int]]:
        start = 0
        for at, found in enumerate(ids):
            if [found] == self._separator:
                yield ids[start:at]
                start = at + 1
        yield ids[start:]


def as_bytes(ids: list[int]) -> bytes:
    """Return ids as the bytes of an int32 array."""
    return array("i", ids).tobytes()


#: Number of characters per call of the library, which uses up to 90 bytes per token until the call
#: returns.
GROUP_CHARS: Final = 512 * 1024

#: Size of an id, bytes.
ID_BYTES: Final = 4


#: For a tokenizer.json alone.
NO_CONFIG: Final = TokenizerConfig()


class Tokenizer:
    """A model's tokenizer, which truncates texts and counts the dropped tokens.

    Attributes:
        max_length: maximum number of tokens of a text, special tokens included.
        pad_id: padding token.
    """

    def __init__(self, path: Path, max_length: int, config: TokenizerConfig = NO_CONFIG) -> None:
        """Load tokenizer.json.

        Args:
            path: the file.
            max_length: maximum number of tokens of a text.
            config: what the other files of the model say.

        Raises:
            ModelError: the file is damaged or contradicts the others, or max_length leaves no room
                beside special tokens.
        """
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(
                f"{path} is not a readable tokenizer ({error}). Fetch the file again."
            ) from error
        padding, truncation = self._tokenizer.padding, self._tokenizer.truncation
        side = config.truncation_side or (truncation or {}).get("direction", "right")
        self._cut_left = side == "left"
        _apply(self._tokenizer, config, path)
        self.max_length = max_length
        self.pad_id = _pad_id(self._tokenizer, padding)
        # The file of all-MiniLM-L6-v2 truncates and pads to 128 tokens; the model's limit is 256.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        prefix, suffix = _special_ids(self._tokenizer, path)
        _check_ends(self._tokenizer, config, path, prefix, suffix)
        self._room = max_length - len(prefix) - len(suffix)
        if self._room <= 0:
            raise ModelError(
                f"A maximum length of {max_length} tokens leaves no room for a text beside the "
                f"special tokens of {path}."
            )
        self._prefix, self._suffix = as_bytes(prefix), as_bytes(suffix)
        self._words = None
        added = self._tokenizer.get_added_tokens_decoder().values()
        # The cache finds added tokens in the raw text, not those that match normalized text.
        if _splits_into_words(self._tokenizer) and not any(one.normalized for one in added):
            self._words = WordCache(self._encode_uncached, [one.content for one in added])

    def check_ids_below(self, limit: int) -> None:
        """Check that all ids are below the limit; OpenVINO ignores ids without weights silently.

        Raises:
            ModelError: an id is not below the limit.
        """
        largest = max(self._tokenizer.get_vocab().values(), default=0)
        if largest >= limit:
            raise ModelError(
                f"tokenizer.json has token id {largest:,}, but the weights have {limit:,} tokens. "
                "Fetch both files again. Added tokens need weights of their own."
            )

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens:
        """Tokenize texts; of a text that is too long, only the first tokens.

        Raises:
            EngineError: the tokenizer failed; the message contains no text.
        """
        parts: list[bytes] = []
        lengths: list[int] = []
        dropped: list[int] = []
        room = self._room * ID_BYTES
        for group in _groups(texts):
            for ids in self._encode(group):
                truncated = ids[-room:] if self._cut_left else ids[:room]
                parts += (self._prefix, truncated, self._suffix)
                lengths.append(len(truncated))
                dropped.append(len(ids) - len(truncated))
        sizes = np.array(lengths, np.int64) // ID_BYTES + (self.max_length - self._room)
        return RaggedTokens(
            np.frombuffer(b"".join(parts), np.int32),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)]),
            np.array(dropped, np.uint32) // ID_BYTES,
        )

    def prompt_tokens(self, prompt: str) -> int:
        """Count the tokens at the start of a text that sentence-transformers takes for the prompt.

        These are the special tokens before a text and those of the prompt alone.
        """
        tokens = self.tokenize([prompt])
        return len(tokens.ids) - len(self._suffix) // ID_BYTES

    def _encode(self, texts: Sequence[str]) -> Iterable[bytes]:
        try:
            if self._words:
                return self._words.encode(texts)
            return map(as_bytes, self._encode_uncached(texts))
        except Exception as error:
            # Only the type of the cause, because its message may quote a text.
            raise EngineError(
                f"The tokenizer failed on {len(texts):,} texts ({type(error).__name__})."
            ) from None

    def _encode_uncached(self, texts: Sequence[str]) -> Iterator[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return (encoding.ids for encoding in encodings)


def _apply(tokenizer: tokenizers.Tokenizer, config: TokenizerConfig, path: Path) -> None:
    # Change a tokenizer to what the other files say, as transformers does.
    model = type(tokenizer.model).__name__
    if config.model and model != config.model:
        raise ModelError(
            f"{path} has a {model} model, but {config.path} names a tokenizer_class with "
            f"{config.model}. Fetch both files again."
        )
    if config.bert:
        if not isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
            kind = type(tokenizer.normalizer).__name__
            raise ModelError(
                f"{path} has the normalizer {kind}, but {config.path} names a tokenizer_class with "
                "a BertNormalizer. Fetch both files again, or set tokenizer_class to "
                "PreTrainedTokenizerFast if tokenizer.json is right."
            )
        tokenizer.normalizer = normalizers.BertNormalizer(**config.bert)
    if config.lowercase_first:
        lower = normalizers.Lowercase()
        old = tokenizer.normalizer
        if not _lowercases(old):
            tokenizer.normalizer = normalizers.Sequence([lower, *([old] if old else [])])
    _check_added(tokenizer, config, path)
    space = _prefix_space(tokenizer)
    if None not in (config.add_prefix_space, space) and config.add_prefix_space != space:
        raise ModelError(
            f"{config.path}: add_prefix_space is {config.add_prefix_space}, but {path.name} has "
            f"{space}. Fetch both files again."
        )


def _lowercases(normalizer: normalizers.Normalizer | None) -> bool:
    if normalizer is None:
        return False
    state = json.loads(normalizer.__getstate__())
    steps = state.get("normalizers") or [state]
    return any(step.get("lowercase") or step.get("type") == "Lowercase" for step in steps)


def _prefix_space(tokenizer: tokenizers.Tokenizer) -> bool | None:
    # Whether a byte-level tokenizer puts a space before a text; None for others.
    if tokenizer.pre_tokenizer is None:
        return None
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers") or [state]
    found = [step["add_prefix_space"] for step in steps if step.get("type") == "ByteLevel"]
    return any(found) if found else None


def _check_added(tokenizer: tokenizers.Tokenizer, config: TokenizerConfig, path: Path) -> None:
    known = tokenizer.get_added_tokens_decoder()
    for number, wanted in config.added.items():
        token = known.get(number)
        found = token and {
            "content": token.content,
            **{name: getattr(token, name) for name in ADDED_FLAGS},
        }
        if found != wanted:
            raise ModelError(
                f"{config.path}: added_tokens_decoder has {number}: {wanted}, but {path.name} has "
                f"{found or 'no such added token'}. Fetch both files again."
            )
    for name, content in config.tokens.items():
        if tokenizer.token_to_id(content) is None:
            raise ModelError(
                f"{config.path}: {name} is {content}, which is not in {path.name}. Fetch both "
                "files again."
            )


def _check_ends(
    tokenizer: tokenizers.Tokenizer,
    config: TokenizerConfig,
    path: Path,
    prefix: list[int],
    suffix: list[int],
) -> None:
    # Tokens around a text, as the other files ask for them.
    wanted = {}
    if config.bert:
        wanted = {"cls_token": prefix, "sep_token": suffix}
    wanted |= {
        f"{name}_token": ids
        for name, ids in (("bos", prefix), ("eos", suffix))
        if config.adds.get(name)
    }
    for name, ids in wanted.items():
        content = config.tokens.get(name)
        if content is not None and ids != [tokenizer.token_to_id(content)]:
            shown = [tokenizer.id_to_token(number) for number in ids] or "nothing"
            raise ModelError(
                f"{config.path}: {name} is {content}, but {path.name} puts {shown} there. Fetch "
                "both files again."
            )


def _splits_into_words(tokenizer: tokenizers.Tokenizer) -> bool:
    return (
        isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and isinstance(tokenizer.model, models.WordPiece)
    )


def _groups(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    # Each group has GROUP_CHARS characters at most, or is a single longer text.
    start = size = 0
    for index, text in enumerate(texts):
        if index > start and size + len(text) > GROUP_CHARS:
            yield texts[start:index]
            start, size = index, 0
        size += len(text)
    if start < len(texts):
        yield texts[start:]


def _special_ids(tokenizer: tokenizers.Tokenizer, path: Path) -> tuple[list[int], list[int]]:
    # Tokens that the template adds before and after a text.
    whole = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    for at in range(len(whole) - len(bare) + 1):
        if whole[at : at + len(bare)] == bare:
            return whole[:at], whole[at + len(bare) :]
    raise ModelError(
        f"{path} does not add fixed special tokens around a text, so embedq cannot use it. "
        "Use another model."
    )


def _pad_id(tokenizer: tokenizers.Tokenizer, padding: dict[str, int] | None) -> int:
    if padding:
        return int(padding["pad_id"])
    for token in ("[PAD]", "<pad>"):
        found = tokenizer.token_to_id(token)
        if found is not None:
            return found
    return 0
