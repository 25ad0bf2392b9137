"""Tests of how documents are grouped into batches with chained digests."""

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


def batches_of_eight(documents: Iterable[Document]) -> list[InputBatch]:
    def split_by_eight(texts: Iterable[object]) -> Iterator[TextBatch]:
        return split(texts, max_texts=8, max_tokens=200, max_length=256)

    return list(iter_batches(documents, split_by_eight))


@given(DOCUMENTS)
def test_batches_hold_all_documents_in_order(documents: list[Document]) -> None:
    found = batches_of_eight(documents)

    batched = [document for batch in found for document in batch.documents]
    assert [(d.id, refusal(d.text)) for d in batched] == [
        (d.id, refusal(d.text)) for d in documents
    ]
    for batch in found:
        for offset, document in enumerate(batch.documents):
            refused = offset in batch.text_batch.refused
            assert batch.text_batch.texts[offset] == ("" if refused else document.text)
            assert batch.hashes[offset] == (
                "" if refused else text_hash(batch.text_batch.texts[offset])
            )


@pytest.mark.parametrize(
    "text",
    ["x" * (2 * MAX_TEXT_BYTES), ["x" * 100_000], "\0" * 100_000, "\ud800" * 100_000],
    ids=["too large", "no text", "nul", "no unicode"],
)
def test_refused_texts_are_dropped_from_memory(text: object) -> None:
    documents = [Document(number, text) for number in range(8)]

    [batch, *_] = batches_of_eight(documents)

    assert not any(document.text is text for document in batch.documents)
    assert len({id(document.text) for document in batch.documents}) == 1
    assert {refusal(document.text) for document in batch.documents} == {refusal(text)}


def test_batch_is_returned_once_one_more_document_is_read() -> None:
    pulled = 0

    def documents() -> Iterator[Document]:
        nonlocal pulled
        for number in range(1_000):
            pulled += 1
            yield Document(number, "text")

    stream = iter_batches(
        documents(), lambda texts: split(texts, max_texts=8, max_tokens=999, max_length=9)
    )
    returned = sum(len(next(stream).text_batch) for _ in range(10))

    assert pulled == returned + 1


CHANGES: dict[str, Callable[[list[Document]], list[Document]]] = {
    "id": lambda d: [Document("x", d[0].text), *d[1:]],
    "text": lambda d: [Document(d[0].id, "x"), *d[1:]],
    "order": lambda d: [d[1], d[0], *d[2:]],
    "one less": lambda d: d[1:],
    "moved border": lambda d: [Document(d[0].id, "t0t1"), *d[2:]],
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_in_the_first_batch_changes_all_digests(name: str) -> None:
    documents = [Document(i, f"t{i}") for i in range(40)]

    before = [batch.digest for batch in batches_of_eight(documents)]
    after = [batch.digest for batch in batches_of_eight(CHANGES[name](documents))]

    assert before == [batch.digest for batch in batches_of_eight(documents)]
    assert not set(before) & set(after)


def test_change_of_the_last_document_leaves_earlier_digests() -> None:
    documents = [Document(i, f"t{i}") for i in range(40)]

    before = [batch.digest for batch in batches_of_eight(documents)]
    after = [batch.digest for batch in batches_of_eight([*documents[:-1], Document(39, "other")])]

    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_text_hash_is_the_start_of_its_sha256() -> None:
    assert text_hash("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"[:16]
    assert len(text_hash("")) == HASH_CHARACTERS
