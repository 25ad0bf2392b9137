"""Pieces: documents stay with their batch, and one digest covers all that went before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.bulk.run import HASH_CHARACTERS, InputBatch, iter_batches, text_hash
from embedq.jobs.batches import Document, TextBatch, split
from embedq.protocol.contract import MAX_TEXT_BYTES, refusal

TEXTS = st.one_of(st.text(), st.none(), st.integers(), st.just("a\0b"), st.just("\ud800"))
DOCUMENTS = st.lists(st.builds(Document, st.one_of(st.text(), st.integers()), TEXTS), max_size=60)


def cut(documents: Iterable[Document]) -> list[InputBatch]:
    def few(texts: Iterable[object]) -> Iterator[TextBatch]:
        return split(texts, max_texts=8, max_tokens=200, max_length=256)

    return list(iter_batches(documents, few))


@given(DOCUMENTS)
def test_every_document_is_in_one_piece(documents: list[Document]) -> None:
    """Together the pieces hold all documents in order, each beside its text and its hash."""
    found = cut(documents)

    kept = [document for piece in found for document in piece.documents]
    assert [(d.id, refusal(d.text)) for d in kept] == [(d.id, refusal(d.text)) for d in documents]
    for piece in found:
        for offset, document in enumerate(piece.documents):
            refused = offset in piece.slice.refused
            assert piece.slice.texts[offset] == ("" if refused else document.text)
            assert piece.hashes[offset] == ("" if refused else text_hash(piece.slice.texts[offset]))


@pytest.mark.parametrize(
    "text",
    ["x" * (2 * MAX_TEXT_BYTES), ["x" * 100_000], "\0" * 100_000, "\ud800" * 100_000],
    ids=["too large", "no text", "nul", "no unicode"],
)
def test_refused_texts_are_not_kept(text: object) -> None:
    """A batch full of texts that nobody embeds takes no more memory than one of them."""
    documents = [Document(number, text) for number in range(8)]

    [piece, *_] = cut(documents)

    assert not any(document.text is text for document in piece.documents)
    assert len({id(document.text) for document in piece.documents}) == 1
    assert {refusal(document.text) for document in piece.documents} == {refusal(text)}


def test_documents_are_pulled_one_batch_ahead_at_most() -> None:
    """A piece is there as soon as the first document behind it is read."""
    pulled = 0

    def documents() -> Iterator[Document]:
        nonlocal pulled
        for number in range(1_000):
            pulled += 1
            yield Document(number, "text")

    stream = iter_batches(
        documents(), lambda texts: split(texts, max_texts=8, max_tokens=999, max_length=9)
    )
    given_out = sum(len(next(stream).slice) for _ in range(10))

    assert pulled == given_out + 1


CHANGES: dict[str, Callable[[list[Document]], list[Document]]] = {
    "id": lambda d: [Document("x", d[0].text), *d[1:]],
    "text": lambda d: [Document(d[0].id, "x"), *d[1:]],
    "order": lambda d: [d[1], d[0], *d[2:]],
    "one less": lambda d: d[1:],
    "moved border": lambda d: [Document(d[0].id, "t0t1"), *d[2:]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_a_first_document_changes_every_later_digest(name: str) -> None:
    """The digest is a chain: one comparison tells whether all before it is the same."""
    documents = [Document(i, f"t{i}") for i in range(40)]

    before = [piece.digest for piece in cut(documents)]
    after = [piece.digest for piece in cut(CHANGES[name](documents))]

    assert before == [piece.digest for piece in cut(documents)]
    assert not set(before) & set(after)


def test_change_of_a_last_document_leaves_earlier_digests() -> None:
    """What was safe before the change is still vouched for."""
    documents = [Document(i, f"t{i}") for i in range(40)]

    before = [piece.digest for piece in cut(documents)]
    after = [piece.digest for piece in cut([*documents[:-1], Document(39, "other")])]

    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_hash_is_short_and_stable() -> None:
    """The hash in the items is the start of the text's sha256, so that others can compute it."""
    assert text_hash("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"[:16]
    assert len(text_hash("")) == HASH_CHARACTERS
