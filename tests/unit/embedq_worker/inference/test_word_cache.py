"""Tests that tokens from the word cache equal those of the tokenizers library."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.models import WORDS, real_model, write_tokenizer
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from embedq_worker.inference import tokenizer
from embedq_worker.inference.tokenizer import Tokenizer, WordCache, as_bytes

#: Parts of test texts: words, punctuation, special tokens, combining accents, scripts with and
#: without spaces, and whitespace and control characters that Python and the library classify
#: differently.
PIECES = st.one_of(
    st.sampled_from([*WORDS, "The", "QUEUE's", "caf\u00e9", "na\u00efve", "stra\u00dfe", "\u0130"]),
    st.sampled_from(["[SEP]", "[sep]", "[CLS", "]", "##s", "\u4e2d\u6587", "\u0e44\u0e17\u0e22"]),
    st.sampled_from(
        ["\u0301", "\u0338", "\u200d", "\u00a0", "\u3000", "\u2028", "\uff0c", "\ufffd"]
    ),
    st.characters(max_codepoint=0x7F),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
TEXTS = st.lists(st.lists(PIECES, max_size=12).map("".join), max_size=6)


def load_library(path: Path) -> HfTokenizer:
    """Load the library's tokenizer without padding and truncation."""
    library = HfTokenizer.from_file(str(path))
    library.no_padding()
    library.no_truncation()
    return library


def assert_agrees(tokenizer: Tokenizer, library: HfTokenizer, texts: list[str]) -> None:
    tokens = tokenizer.tokenize(texts)

    for row, text in enumerate(texts):
        ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        assert ids == library.encode(text).ids, ascii(text)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer of few words and no punctuation."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    write_tokenizer(path)
    return path


@settings(max_examples=300)
@given(TEXTS)
@example(["a\x0bb a\x1cb a\x85b a\x00b", "queue!\u0301s", "\u0338=the", "the[SEP]queue [ SEP ]"])
def test_tokens_of_any_text_equal_those_of_the_library(small: Path, texts: list[str]) -> None:
    assert_agrees(Tokenizer(small, 512), load_library(small), [*texts, *texts])


@pytest.fixture(scope="module")
def real() -> tuple[Tokenizer, HfTokenizer]:
    """Return this package's and the library's tokenizer of the real model."""
    path = real_model().tokenizer_path
    return Tokenizer(path, 8192), load_library(path)


@pytest.mark.model
@settings(max_examples=300)
@given(TEXTS)
def test_tokens_of_the_real_model_equal_those_of_the_library(
    real: tuple[Tokenizer, HfTokenizer], texts: list[str]
) -> None:
    assert_agrees(*real, texts)


def write_modified(path: Path, into: Path, modify: Callable[[HfTokenizer], object]) -> Path:
    """Write a changed copy of a tokenizer.json."""
    tokenizer = HfTokenizer.from_file(str(path))
    modify(tokenizer)
    tokenizer.save(str(into))
    return into


def split_at_spaces(tokenizer: HfTokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


@pytest.mark.parametrize(
    "modify",
    [
        split_at_spaces,
        lambda tokenizer: tokenizer.add_tokens(["the queue"]),
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("queue", normalized=False)]),
    ],
)
def test_tokenizers_with_multi_word_tokens_are_not_split_into_words(
    small: Path, tmp_path: Path, modify: Callable[[HfTokenizer], object]
) -> None:
    path = write_modified(small, tmp_path / "tokenizer.json", modify)

    texts = ["the queue", "The Queue", "a queue,the queues", "queue,"]

    assert_agrees(Tokenizer(path, 48), load_library(path), texts)


class Library:
    """Encodes a word as the numbers of its letters and records what it encodes."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Iterable[list[int]]:
        self.encoded += texts
        return [[ord(c) for c in text.replace("\u201a", ",") if c != " "] for text in texts]


def test_library_encodes_each_word_once() -> None:
    library = Library()
    word_cache = WordCache(library, [])
    word_cache.encode(["to be or not to be"])
    encoded = list(library.encoded)

    found = word_cache.encode(["be, not to be!"])

    assert library.encoded == encoded
    assert found == [as_bytes([ord(c) for c in "be,nottobe!"])]


def test_word_containing_the_separator_is_encoded_alone() -> None:
    word_cache = WordCache(Library(), [])

    assert word_cache.encode(["one t\u201awo three"]) == [
        as_bytes([ord(c) for c in "onet,wothree"])
    ]


def test_full_word_cache_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MAX_CACHE_BYTES", 10 * tokenizer.ENTRY_BYTES)
    library = Library()
    word_cache = WordCache(library, [])
    for _ in range(2):
        for number in range(100):
            assert word_cache.encode([f"n{number}"]) == [as_bytes([ord(c) for c in f"n{number}"])]

    assert sum(encoded.count("n7") for encoded in library.encoded) >= 2


def test_long_text_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "MAX_CHARACTERS", 10)
    library = Library()

    found = WordCache(library, []).encode(["to be or not", "to be"])

    assert "to be or not" in library.encoded
    assert found == [as_bytes([ord(c) for c in whole]) for whole in ("tobeornot", "tobe")]
