"""Embed this project's own documentation and answer three questions from the vectors.

python ops/demo_docs.py [COMMAND ...]     COMMAND instead of `embedq`
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
#: What a reader of the documentation might ask.
QUESTIONS = (
    "What happens if I kill the embed command with kill -9 or Ctrl-C?",
    "What happens to a batch when its worker dies?",
    "What becomes of a text that is too large?",
)
#: Characters below which a paragraph says too little to be an answer.
MIN_CHARACTERS = 60
#: Characters of an answer that are shown.
SHOWN_CHARACTERS = 200
#: Start of the id of a question.
QUESTION = "question:"


class Passage(NamedTuple):
    """A text and where it comes from, ``file:line`` or ``question:n``."""

    id: str
    text: str


def main(command: Sequence[str]) -> int:
    """Embed, answer and print; return the exit code of the embedding if that failed."""
    passages = list(read_passages(ROOT))
    questions = [Passage(f"{QUESTION}{n}", text) for n, text in enumerate(QUESTIONS, 1)]
    with tempfile.TemporaryDirectory(prefix="embedq-demo-") as folder:
        texts, output = Path(folder, "docs.jsonl"), Path(folder, "docs.npy")
        texts.write_text("".join(json.dumps(p._asdict()) + "\n" for p in passages + questions))
        print(f"Embedding {len(passages):,} passages of the documentation of embedq.", flush=True)
        run = (*command, "embed", str(texts), "-o", str(output), "--local")
        # What it prints names a file that is gone in a moment; what it says goes to stderr.
        if code := subprocess.run(run, stdout=subprocess.DEVNULL).returncode:
            return code
        ids, vectors = load_output(output)
    show(Console(highlight=False), {p.id: p.text for p in passages}, ids, vectors)
    return 0


def read_passages(root: Path) -> Iterator[Passage]:
    """Yield the paragraphs of every Markdown file and the docstrings of every module."""
    for path in _files(root, ".md"):
        for line, text in paragraphs(path.read_text()):
            yield Passage(f"{path.relative_to(root)}:{line}", text)
    for package in ("producer", "worker"):
        for path in _files(root / package, ".py"):
            text = ast.get_docstring(ast.parse(path.read_text())) or ""
            if "\n" in text:  # a single line names a room and explains nothing
                yield Passage(f"{path.relative_to(root)}:1", text)


def paragraphs(markdown: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each paragraph or table row, after the heading it is under."""
    heading, start, lines, fenced = "", 0, list[str](), False
    for number, line in enumerate([*markdown.splitlines(), ""], 1):
        if line.startswith("```"):
            fenced = not fenced
        elif line.startswith("#") and not fenced:
            heading = line.lstrip("# ")
        elif line.startswith("|") and len(line) >= MIN_CHARACTERS and not fenced:
            yield number, ": ".join(filter(None, [heading, *map(str.strip, line.split("|"))]))
        elif line.startswith("    ") and not lines:
            continue  # commands and their output
        elif line.strip() and not line.startswith("|") and not fenced:
            start = start if lines else number
            lines.append(line.strip())
            continue
        if sum(map(len, lines)) >= MIN_CHARACTERS:
            yield start, ": ".join(filter(None, [heading, " ".join(lines)]))
        lines = []


def load_output(path: Path) -> tuple[list[str], npt.NDArray[np.float32]]:
    """Return the ids and the vectors, float32 [n, D], of the texts that were embedded."""
    sidecar = path.with_suffix(".items.jsonl").read_text().splitlines()
    items = [json.loads(line) for line in sidecar]
    kept = [row for row, item in enumerate(items) if item["status"] == "ok"]
    return [str(items[row]["id"]) for row in kept], np.load(path)[kept]


def show(
    console: Console, texts: dict[str, str], ids: Sequence[str], vectors: npt.NDArray[np.float32]
) -> None:
    """Print each question with the passage closest to it."""
    asked = np.array([name.startswith(QUESTION) for name in ids])
    where = np.flatnonzero(~asked)
    cosines = vectors[asked] @ vectors[~asked].T  # unit vectors: [questions, passages]
    for row, scores in zip(np.flatnonzero(asked), cosines, strict=True):
        best = int(scores.argmax())
        name = ids[int(where[best])]
        question = QUESTIONS[int(ids[int(row)].removeprefix(QUESTION)) - 1]
        answer = " ".join(texts[name].split())
        if len(answer) > SHOWN_CHARACTERS:
            answer = answer[:SHOWN_CHARACTERS].rsplit(" ", 1)[0] + " ..."
        console.print()
        console.print(Text(question, style="bold"))
        console.print(Padding(Text(answer), (0, 0, 0, 4)))
        console.print(Padding(Text(f"{name}  cosine {scores[best]:.2f}", "dim"), (0, 0, 0, 4)))


def _files(root: Path, suffix: str) -> list[Path]:
    """Find files in order, without hidden folders and Python environments."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        if "pyvenv.cfg" in names:
            below.clear()
        else:
            found += [Path(folder, name) for name in names if name.endswith(suffix)]
    return sorted(found)


if __name__ == "__main__":
    own = [str(Path(sys.executable).with_name("embedq"))]
    sys.exit(main(sys.argv[1:] or own))
