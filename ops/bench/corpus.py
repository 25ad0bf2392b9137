"""Generate texts that every machine has, from the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

#: Seed of all random choices, so that every machine gets the same texts.
SEED = 20261122


def docstrings(n: int) -> list[str]:
    """Return n distinct docstrings, beyond the number of docstrings as numbered repeats.

    Texts differ between versions of Python, so figures of two versions are not comparable.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not {"site-packages", "test", "tests", "idle_test"} & set(path.parts):
            found.update(dict.fromkeys(_of_file(path)))
    texts = list(found)
    random.Random(SEED).shuffle(texts)
    return _repeat(texts, n)


def titles(n: int) -> list[str]:
    """Return n first lines of docstrings, about ten words each."""
    lines = dict.fromkeys(text.partition("\n")[0][:80] for text in docstrings(12_000))
    return _repeat(list(lines), n)


def chunks(n: int) -> list[str]:
    """Return n chunks of 1,000 to 1,500 characters, as document splitters produce them."""
    return _repeat(list(_joined(docstrings(12_000))), n)


def mixed(n: int) -> list[str]:
    """Return n texts, two thirds of them random words in ten other alphabets.

    The words have no meaning, but cost tokenizer and wire as much as real texts in these scripts.
    """
    choose = random.Random(SEED)
    english = docstrings(n)
    return [
        english[at] if at % 3 == 0 else _foreign(choose, f"{number}", choose.choice(ALPHABETS))
        for number, at in enumerate(range(n))
    ]


#: First and last letter of each alphabet, and the letters of a word in it.
ALPHABETS: Final = (
    ("\u0430", "\u044f", 6),  # Cyrillic
    ("\u03b1", "\u03c9", 6),  # Greek
    ("\u0905", "\u0939", 4),  # Devanagari
    ("\u0627", "\u064a", 5),  # Arabic
    ("\u05d0", "\u05ea", 5),  # Hebrew
    ("\u4e00", "\u4fff", 2),  # Chinese
    ("\u3042", "\u3093", 4),  # Japanese
    ("\uac00", "\uafff", 3),  # Korean
    ("\u0e01", "\u0e2e", 6),  # Thai
    ("\u00e0", "\u00f6", 7),  # Latin with accents
)


def _foreign(choose: random.Random, name: str, alphabet: tuple[str, str, int]) -> str:
    first, last, length = alphabet
    letters = range(ord(first), ord(last) + 1)
    words = ["".join(chr(choose.choice(letters)) for _ in range(length)) for _ in range(30)]
    return f"{' '.join(words)} {name}"


def _joined(texts: list[str]) -> Iterator[str]:
    whole = ""
    for text in texts:
        whole = f"{whole} {text}".strip()[:1500]
        if len(whole) >= 1000:
            yield whole
            whole = ""


def _repeat(texts: list[str], n: int) -> list[str]:
    rounds = -(-n // len(texts))
    return [f"{text} ({at})" if at else text for at in range(rounds) for text in texts][:n]


def _of_file(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    # Shorter docstrings are titles, not prose.
    return [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) >= 60]


def sized(n: int, tokens: int) -> list[str]:
    """Return n distinct texts of about this many WordPiece tokens, special tokens included."""
    words = [word for word in " ".join(docstrings(2000)).split() if word.isalpha()]
    choose = random.Random(SEED)
    # Two special tokens, and three for the number; a word has 1.14 tokens on average.
    length = max(1, round((tokens - 5) / 1.14))
    starts = [choose.randrange(len(words) - length) for _ in range(n)]
    return [f"{' '.join(words[at : at + length])} {number}" for number, at in enumerate(starts)]


#: Generators of n texts, by name of the corpus.
CORPORA: Final[Mapping[str, Callable[[int], list[str]]]] = {
    "titles": titles,
    "docstrings": docstrings,
    "chunks": chunks,
    "mixed": mixed,
}
