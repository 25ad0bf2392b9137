"""What is remembered of words is what the library says of whole texts, and it is asked once."""

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

#: What texts are put together from: words, all signs, special tokens, accents before and after
#: their letters, scripts with and without spaces, blanks and controls that Python and the library
#: see differently.
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


def library_of(path: Path) -> HfTokenizer:
    """Load the library's own, which neither pads nor cuts."""
    library = HfTokenizer.from_file(str(path))
    library.no_padding()
    library.no_truncation()
    return library


def assert_agrees(tokenizer: Tokenizer, library: HfTokenizer, texts: list[str]) -> None:
    """Each text has the ids that the library gives the whole of it."""
    tokens = tokenizer.tokenize(texts)

    for row, text in enumerate(texts):
        ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist()
        assert ids == library.encode(text).ids, ascii(text)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of few words and no signs."""
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    write_tokenizer(path)
    return path


@settings(max_examples=300)
@given(TEXTS)
@example(["a\x0bb a\x1cb a\x85b a\x00b", "queue!\u0301s", "\u0338=the", "the[SEP]queue [ SEP ]"])
def test_texts_of_any_kind_agree(small: Path, texts: list[str]) -> None:
    """Whatever is in a text, and whatever was asked before it."""
    assert_agrees(Tokenizer(small, 512), library_of(small), [*texts, *texts])


@pytest.fixture(scope="module")
def real() -> tuple[Tokenizer, HfTokenizer]:
    """Ours and the library's own of the real model; ours remembers from example to example."""
    path = real_model().tokenizer_path
    return Tokenizer(path, 8192), library_of(path)


@pytest.mark.model
@settings(max_examples=300)
@given(TEXTS)
def test_real_words_agree(real: tuple[Tokenizer, HfTokenizer], texts: list[str]) -> None:
    """The same with 30,522 tokens."""
    assert_agrees(*real, texts)


def change(path: Path, into: Path, how: Callable[[HfTokenizer], object]) -> Path:
    """Write a changed tokenizer.json."""
    tokenizer = HfTokenizer.from_file(str(path))
    how(tokenizer)
    tokenizer.save(str(into))
    return into


def split_at_spaces(tokenizer: HfTokenizer) -> None:
    """Make a sign a part of its word."""
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


@pytest.mark.parametrize(
    "how",
    [
        split_at_spaces,
        lambda tokenizer: tokenizer.add_tokens(["the queue"]),
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("queue", normalized=False)]),
    ],
)
def test_tokenizers_that_join_words_agree(
    small: Path, tmp_path: Path, how: Callable[[HfTokenizer], object]
) -> None:
    """A word's tokens depend on its neighbors there, so texts are asked for as a whole."""
    path = change(small, tmp_path / "tokenizer.json", how)

    texts = ["the queue", "The Queue", "a queue,the queues", "queue,"]

    assert_agrees(Tokenizer(path, 48), library_of(path), texts)


class Library:
    """Gives a word the numbers of its letters, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Encode texts; a space has no number."""
        self.asked += texts
        return [[ord(c) for c in text.replace("\u201a", ",") if c != " "] for text in texts]


def test_library_is_asked_once_for_a_word() -> None:
    """The second text of the same words costs it nothing."""
    library = Library()
    known = WordCache(library, [])
    known.encode(["to be or not to be"])
    asked = list(library.asked)

    found = known.encode(["be, not to be!"])

    assert library.asked == asked
    assert found == [as_bytes([ord(c) for c in "be,nottobe!"])]


def test_word_that_looks_like_a_sign_stays_whole() -> None:
    """Where the sign put between new words comes out of one of them, each is asked for alone."""
    known = WordCache(Library(), [])

    assert known.encode(["one t\u201awo three"]) == [as_bytes([ord(c) for c in "onet,wothree"])]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is full all is forgotten and learnt anew; the ids are the same."""
    monkeypatch.setattr(tokenizer, "MOST_BYTES", 10 * tokenizer.ENTRY_BYTES)
    library = Library()
    known = WordCache(library, [])
    for _ in range(2):
        for number in range(100):
            assert known.encode([f"n{number}"]) == [as_bytes([ord(c) for c in f"n{number}"])]

    assert sum(asked.count("n7") for asked in library.asked) >= 2


def test_longest_texts_are_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of a million characters would be a million words."""
    monkeypatch.setattr(tokenizer, "MOST_CHARACTERS", 10)
    library = Library()

    found = WordCache(library, []).encode(["to be or not", "to be"])

    assert "to be or not" in library.asked
    assert found == [as_bytes([ord(c) for c in whole]) for whole in ("tobeornot", "tobe")]
