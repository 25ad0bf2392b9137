"""Tests of the wire format of batches, specifications and model descriptions."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedq.errors import BatchTooLarge, MalformedMessage
from embedq.protocol.contract import (
    MAX_BATCH_TEXTS,
    MAX_TEXT_BYTES,
    Accuracy,
    OnLong,
    VectorSpec,
    refusal,
)
from embedq.protocol.message import EmbedBatch, Header, message_headers

SPEC = VectorSpec(model="ab" * 32, dim=384, max_length=256)
TEXTS = ["plain", "", "emoji 🦀", "שלום", "مرحبا", "日本語", "a" * 50_000, "line\nbreak"]

#: Lists of texts that `refusal` accepts.
texts = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50),
    max_size=20,
)


@given(texts)
def test_texts_survive_the_wire_in_order(texts: list[str]) -> None:
    sent = EmbedBatch("job", 7, texts, SPEC).to_message()

    batch = EmbedBatch.from_message(msgpack.unpackb(msgpack.packb(sent)))

    assert list(batch.texts) == texts
    assert not batch.refused


def test_all_fields_of_a_batch_survive_the_wire() -> None:
    spec = SPEC._replace(prompt="query: ", on_long=OnLong.ERROR, accuracy=Accuracy.EXACT)
    sent = EmbedBatch("a-Job_1", 2**25 - 1, ["a", ""], spec, {1: "nul_character"}, rerouted=True)

    got = EmbedBatch.from_message(msgpack.unpackb(msgpack.packb(sent.to_message())))

    assert got == sent
    assert got.task_id == sent.task_id


@pytest.mark.parametrize(
    "change",
    [
        {"model": "cd" * 32},
        {"dim": 385},
        {"max_length": 255},
        {"prompt": "query: "},
        {"on_long": OnLong.ERROR},
        {"accuracy": Accuracy.EXACT},
        {"dtype": "float16"},
        {"quantized": "ab" * 8},
    ],
    ids=lambda change: str(*change),
)
def test_fingerprint_and_digest_depend_on_each_specification_field(change: dict[str, Any]) -> None:
    other = SPEC._replace(**change)

    assert other.fingerprint() != SPEC.fingerprint()
    assert EmbedBatch("job", 0, TEXTS, other).digest() != EmbedBatch("job", 0, TEXTS, SPEC).digest()


def test_every_specification_field_is_covered() -> None:
    [mark] = test_fingerprint_and_digest_depend_on_each_specification_field.pytestmark

    assert {key for change in mark.args[1] for key in change} == set(VectorSpec._fields)


@pytest.mark.parametrize(
    ("one", "other"), [(["ab", "c"], ["a", "bc"]), (["a", ""], ["a"]), (["a", "b"], ["b", "a"])]
)
def test_digest_depends_on_boundaries_number_and_order_of_texts(
    one: list[str], other: list[str]
) -> None:
    assert EmbedBatch("j", 0, one, SPEC).digest() != EmbedBatch("j", 0, other, SPEC).digest()


def test_representations_of_a_batch_show_no_text() -> None:
    batch = EmbedBatch("job", 0, ["Kundengeheimnis"], SPEC)
    header = Header.from_message(batch.to_message())

    shown = (
        f"{batch!r} {batch!s} {message_headers(batch.to_message(), 0.0)} {header!r} {batch.task_id}"
    )

    assert "geheimnis" not in shown


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", ""),
        ("a" * 50_000, ""),
        ("é" * (MAX_TEXT_BYTES // 2), ""),
        ("é" * (MAX_TEXT_BYTES // 2) + "x", "text_too_large"),
        ("x" * (MAX_TEXT_BYTES + 1), "text_too_large"),
        ("\ud800", "not_unicode"),
        ("a\0", "nul_character"),
        (None, "not_a_string"),
        (b"bytes", "not_a_string"),
        (7, "not_a_string"),
    ],
)
def test_refused_text_has_its_code(text: object, code: str) -> None:
    assert refusal(text) == code


def test_oversized_batch_is_refused_before_it_is_sent() -> None:
    with pytest.raises(BatchTooLarge, match=r"5,000 texts; the limit is 4,096"):
        EmbedBatch("job", 0, [""] * 5_000, SPEC).to_message()
    with pytest.raises(BatchTooLarge, match="bytes of text"):
        EmbedBatch("job", 0, ["x" * MAX_TEXT_BYTES] * 5, SPEC).to_message()


def test_batch_of_4096_texts_and_4_mib_is_accepted() -> None:
    batch = EmbedBatch("job", 0, ["x" * 1024] * MAX_BATCH_TEXTS, SPEC)

    assert EmbedBatch.from_message(batch.to_message()) == batch


def test_flipped_bit_never_changes_a_text() -> None:
    texts = [f"A queue keeps its promise to worker {i}." for i in range(8)]
    body = EmbedBatch("job", 0, texts, SPEC).to_message()
    packed = body["texts"]

    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = EmbedBatch.from_message({**body, "texts": bytes(flipped)})
        except MalformedMessage:
            continue
        assert list(found.texts) == texts, bit
