"""Real prose that every machine has: the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import random
import sysconfig
from pathlib import Path

#: The order is shuffled, the same way everywhere.
SEED = 20261122


def docstrings(n: int) -> list[str]:
    """Return n distinct docstrings; with n beyond what there is, numbered repeats.

    Texts differ a little between versions of Python, so figures of two versions are not comparable.
    """
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if not {"site-packages", "test", "tests", "idle_test"} & set(path.parts):
            found.update(dict.fromkeys(_of_file(path)))
    texts = list(found)
    random.Random(SEED).shuffle(texts)
    repeats = [
        f"{text} ({i // len(texts)})" for i, text in zip(range(n), _cycle(texts), strict=False)
    ]
    return texts[:n] if n <= len(texts) else texts + repeats[len(texts) :]


def _of_file(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    # Whole docstrings of a sentence or more: shorter ones are titles, not prose.
    return [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) >= 60]


def _cycle(texts: list[str]) -> list[str]:
    return texts * 1000


def sized(n: int, tokens: int) -> list[str]:
    """Return n texts of about as many WordPiece tokens, special ones included, no two alike."""
    words = [word for word in " ".join(docstrings(2000)).split() if word.isalpha()]
    choose = random.Random(SEED)
    # Two special tokens and three of the number; a word is 1.14 tokens on average.
    length = max(1, round((tokens - 5) / 1.14))
    starts = [choose.randrange(len(words) - length) for _ in range(n)]
    return [f"{' '.join(words[at : at + length])} {number}" for number, at in enumerate(starts)]
