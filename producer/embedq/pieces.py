"""Documents -> numbered pieces: a batch with the names and hashes of its documents.

The digest of a piece covers everything before it too, so one comparison tells whether an input is
still the one that an output was made of.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from embedq.batching import Slice
from embedq.contract import MAX_TEXT_BYTES, Code, refusal
from embedq.files import Document

#: Hex characters of a text's hash in the items: 64 bits, so that two versions of a document never
#: share one in practice.
HASH_CHARACTERS = 16
#: Takes the place of a refused text: refused for the same reason, and one for all.
_STAND_INS: dict[Code, object] = {
    Code.NOT_A_STRING: None,
    Code.TEXT_TOO_LARGE: "x" * (MAX_TEXT_BYTES + 1),
    Code.NUL_CHARACTER: "\0",
    Code.NOT_UNICODE: "\ud800",
}


@dataclass(frozen=True, slots=True)
class Piece:
    """A batch on its way.

    Attributes:
        slice: the texts.
        documents: where they come from; a refused one has a small text that is refused as well.
        hashes: of each text; empty for a refused one.
        digest: of all documents up to the end of this piece.
    """

    slice: Slice
    documents: list[Document]
    hashes: list[str]
    digest: str


def pieces(
    documents: Iterable[Document], split: Callable[[Iterable[object]], Iterator[Slice]]
) -> Iterator[Piece]:
    """Cut documents into pieces.

    Args:
        documents: in order.
        split: cuts texts into batches.
    """
    waiting: list[Document] = []

    def texts() -> Iterator[object]:
        for document in map(_slim, documents):
            waiting.append(document)
            yield document.text

    digest = ""
    for part in split(texts()):
        n = len(part)
        here, waiting[:n] = waiting[:n], []
        hashes = [
            "" if offset in part.refused else text_hash(text)
            for offset, text in enumerate(part.texts)
        ]
        digest = _chain(digest, here, hashes)
        yield Piece(part, here, hashes, digest)


def _slim(document: Document) -> Document:
    """Return a document without the text that nobody will embed: a batch may hold 4,096 of them."""
    code = refusal(document.text)
    return document if code is Code.NONE else replace(document, text=_STAND_INS[code])


def text_hash(text: str) -> str:
    """Return the hash by which a text is known in the items."""
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]


def _chain(before: str, documents: list[Document], hashes: list[str]) -> str:
    state = hashlib.sha256(before.encode())
    state.update(json.dumps([[document.id for document in documents], hashes]).encode())
    return state.hexdigest()
