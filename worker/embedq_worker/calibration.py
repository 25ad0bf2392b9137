"""Texts out of a user's file for quantising: some to calibrate with, others to judge by."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from embedq.contract import refusal
from embedq.errors import InputError
from embedq.files import Document, Fields, expand, read

#: Texts for calibration, and for the report; more changed neither (see quantizing.py).
CALIBRATION_TEXTS: Final = 300
HELD_OUT_TEXTS: Final = 1_000
#: Fewest usable texts of a file.
MIN_TEXTS: Final = 40
#: Documents of a file that are looked at; a larger file is cut here, and the user is told.
MAX_DOCUMENTS: Final = 1_000_000
#: Characters of a text that are kept for each token of the model: more are cut off anyway.
_CHARACTERS_PER_TOKEN: Final = 64
#: The choice is the same every time, for the same file.
_SEED: Final = 20261122
#: Documents between two reports of progress.
_TELL_EVERY: Final = 50_000


class Line(NamedTuple):
    """One text and where it is in its file."""

    number: int
    text: str


class Sample(NamedTuple):
    """What was chosen of a file.

    Attributes:
        calibration, held_out: disjoint, and no text twice.
        read: documents that were looked at.
        complete: the whole file was.
    """

    calibration: list[Line]
    held_out: list[Line]
    read: int
    complete: bool


def sample_texts(
    inputs: Sequence[str],
    max_length: int,
    *,
    text_field: str = "text",
    format: str | None = None,
    calibration: int = CALIBRATION_TEXTS,
    held_out: int = HELD_OUT_TEXTS,
    tell: Callable[[str], None] = lambda _: None,
) -> Sample:
    """Choose texts at random from files, in memory that does not grow with them.

    Args:
        inputs: names and globs of txt, jsonl or csv, or of a .gz of one.
        max_length: tokens the model takes.
        text_field: field of the text.
        format: of every input; default: by its ending.
        calibration, held_out: how many at most. Of a small file, a quarter is for calibration.
        tell: gets progress.

    Raises:
        InputError: a file cannot be read, or has too few texts.
    """
    wanted = calibration + held_out
    rng = random.Random(_SEED)
    chosen: list[Line] = []
    seen: set[int] = set()
    at, complete = 0, True
    for at, document in enumerate(_documents(inputs, text_field, format), 1):
        if at > MAX_DOCUMENTS:
            at, complete = MAX_DOCUMENTS, False
            break
        if at % _TELL_EVERY == 0:
            tell(f"{at:,} documents read")
        text = document.text
        if refusal(text) or not isinstance(text, str) or not text.strip():
            continue
        mark = hash(text)  # a collision loses one text of a million
        if mark in seen:
            continue
        seen.add(mark)
        line = Line(int(document.id), text[: _CHARACTERS_PER_TOKEN * max_length])
        if len(chosen) < wanted:
            chosen.append(line)
        elif (place := rng.randrange(len(seen))) < wanted:
            chosen[place] = line
    if len(chosen) < MIN_TEXTS:
        raise InputError(
            f"{', '.join(inputs)}: {len(chosen):,} different texts that can be embedded, of "
            f"{at:,} documents; quantising needs at least {MIN_TEXTS}, and {wanted:,} are better. "
            "Give it a file of texts like those that you will embed."
        )
    rng.shuffle(chosen)
    cut = min(calibration, max(MIN_TEXTS // 4, len(chosen) // 4))
    return Sample(chosen[:cut], chosen[cut : cut + held_out], at, complete)


def _documents(inputs: Sequence[str], text_field: str, format: str | None) -> Iterator[Document]:
    # No file has a field of this name, so that every document is named by its line.
    fields = Fields(id="\0", text=text_field)
    return read(expand(inputs), fields=fields, format=format, skip_bad_lines=True)
