"""The wire: what goes round, what is refused, and what a forgery may cost."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from embedq.contract import (
    MAX_BATCH_TEXTS,
    MAX_RAW_BYTES,
    MAX_TEXT_BYTES,
    SCHEMA,
    Accuracy,
    EmbedBatch,
    Header,
    ModelCard,
    OnLong,
    VectorSpec,
    refusal,
)
from embedq.errors import BatchTooLarge, ContractError, MalformedMessage, UnknownSchema

SPEC = VectorSpec(model="ab" * 32, dim=384, max_length=256)
TEXTS = ["plain", "", "emoji 🦀", "שלום", "مرحبا", "日本語", "a" * 50_000, "line\nbreak"]

#: Texts as a producer may send them: anything but what `refusal` refuses.
texts = st.lists(
    st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=50),
    max_size=20,
)
#: Whatever msgpack can carry.
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
garbage = st.recursive(
    leaves | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


def message(of: list[str] = TEXTS, /, **changes: Any) -> dict[str, Any]:
    """Return the message of a batch with some fields replaced, as it comes out of msgpack."""
    body = EmbedBatch("job", 7, of, SPEC).to_message()
    unpacked: dict[str, Any] = msgpack.unpackb(msgpack.packb({**body, **changes}))
    return unpacked


@given(texts)
def test_texts_come_back_as_they_were(texts: list[str]) -> None:
    """Any list of texts survives the wire, in order."""
    batch = EmbedBatch.from_message(message(texts))

    assert list(batch.texts) == texts
    assert not batch.refused


def test_everything_beside_the_texts_comes_back() -> None:
    """Job, index, specification, refused texts and the mark of a re-route survive the wire."""
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
    ],
    ids=lambda change: str(*change),
)
def test_digest_follows_each_field_of_the_specification(change: dict[str, Any]) -> None:
    """Whatever shapes a vector shapes the fingerprint and the digest, and so the task id."""
    other = SPEC._replace(**change)

    assert other.fingerprint() != SPEC.fingerprint()
    assert EmbedBatch("job", 0, TEXTS, other).digest() != EmbedBatch("job", 0, TEXTS, SPEC).digest()


def test_every_field_of_the_specification_is_tried_above() -> None:
    """A new field must be added to the test of the digest."""
    [mark] = [m for m in test_digest_follows_each_field_of_the_specification.pytestmark]  # type: ignore[attr-defined] # set by the decorator

    assert {key for change in mark.args[1] for key in change} == set(VectorSpec._fields)


@pytest.mark.parametrize(
    ("one", "other"), [(["ab", "c"], ["a", "bc"]), (["a", ""], ["a"]), (["a", "b"], ["b", "a"])]
)
def test_digest_tells_texts_apart(one: list[str], other: list[str]) -> None:
    """Borders, number and order of the texts are part of the digest."""
    assert EmbedBatch("j", 0, one, SPEC).digest() != EmbedBatch("j", 0, other, SPEC).digest()


def test_no_text_in_any_representation() -> None:
    """Neither repr nor description of a batch, nor of its header, shows a text."""
    batch = EmbedBatch("job", 0, ["Kundengeheimnis"], SPEC)
    header = Header.from_message(batch.to_message())

    shown = f"{batch!r} {batch!s} {batch.describe()} {header!r} {batch.task_id}"

    assert "geheimnis" not in shown


def test_newer_schema_is_refused_with_a_sentence() -> None:
    """A message of a newer version names both versions and the next step."""
    with pytest.raises(UnknownSchema, match=rf"schema {SCHEMA + 1}; this node .* {SCHEMA}\. Upg"):
        EmbedBatch.from_message(message(v=SCHEMA + 1, texts=b"of the future"))


@pytest.mark.parametrize(
    "change",
    [
        {"n": MAX_BATCH_TEXTS + 1},
        {"raw": MAX_RAW_BYTES + 1},
        {"texts": bytes(200_000), "raw": 100_000},
    ],
    ids=["texts", "declared bytes", "packed bytes"],
)
def test_declared_excess_is_refused(change: dict[str, Any]) -> None:
    """What is declared too large is refused before anything is inflated."""
    with pytest.raises(BatchTooLarge):
        EmbedBatch.from_message(message(**change))


@pytest.mark.parametrize("declared", [1024 * 1024, MAX_RAW_BYTES])
def test_bomb_costs_no_more_than_it_declares(declared: int) -> None:
    """A gigabyte of zeros, declared as little, is refused within a few times the declared size."""
    packer = zstd.ZstdCompressor(3)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    forged = message(raw=declared, texts=bomb)
    tracemalloc.start()

    with pytest.raises(MalformedMessage, match="does not inflate to"):
        EmbedBatch.from_message(forged)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * declared + 2**20


def test_window_beyond_the_contract_is_refused() -> None:
    """A frame that asks its reader for a window of 128 MiB is refused, not served."""
    options = {zstd.CompressionParameter.window_log: 27}
    packer = zstd.ZstdCompressor(options=options)
    frame = packer.compress(bytes(100)) + packer.flush()

    with pytest.raises(MalformedMessage):
        EmbedBatch.from_message(message(raw=100, texts=frame))


@pytest.mark.parametrize(
    "change",
    [
        {"n": 3},
        {"n": 0},
        {"n": 4_000},
        {"raw": 50_000},
        {"texts": b""},
        {"texts": b"not zstd"},
        {"texts": zstd.compress(b"\xff" * 4)},
    ],
    ids=repr,
)
def test_lengths_that_do_not_add_up_are_refused(change: dict[str, Any]) -> None:
    """Count, lengths and declared size must agree with what is there."""
    with pytest.raises(ContractError):
        EmbedBatch.from_message(message(**change))


def test_frame_cut_short_or_followed_by_more_is_refused() -> None:
    """A frame ends where the field ends."""
    packed = message()["texts"]

    for forged in (packed[:-1], packed[: len(packed) // 2], packed + b"more", packed * 2):
        with pytest.raises(ContractError):
            EmbedBatch.from_message(message(texts=forged))


@given(garbage)
def test_garbage_raises_nothing_but_contract_errors(body: object) -> None:
    """No message at all, however wrong, ends in an exception that is not ours."""
    with pytest.raises(ContractError):
        EmbedBatch.from_message(msgpack.unpackb(msgpack.packb(body), strict_map_key=False))


@given(st.sampled_from([*message()]), garbage)
def test_garbage_in_one_field_is_read_or_refused(field: str, value: object) -> None:
    """A good message with one wrong field is refused with an error of ours, or still makes sense."""
    forged = message(["a", "b"], **{field: value})

    try:
        batch = EmbedBatch.from_message(forged)
    except ContractError as error:
        assert str(error)
    else:
        assert len(batch.texts) == 2
        assert field in ("job", "i", "rerouted", "refused", "spec")


@given(st.sampled_from(range(7)), garbage)
def test_garbage_in_the_specification_is_read_or_refused(place: int, value: object) -> None:
    """The same for each field of the specification."""
    spec = list(message()["spec"])
    spec[place] = value

    try:
        batch = EmbedBatch.from_message(message(spec=spec))
    except ContractError:
        return
    assert list(map(type, batch.spec)) == list(map(type, SPEC))


def test_text_that_is_not_utf8_fails_alone() -> None:
    """Broken bytes, NUL or too long a text in a message are refused texts, not a refused batch."""
    parts = [b"good", b"\xff\xfe", b"N\0L", b"x" * (MAX_TEXT_BYTES + 1)]
    raw = b"".join(len(part).to_bytes(4, "little") for part in parts) + b"".join(parts)

    batch = EmbedBatch.from_message(message(n=4, raw=len(raw), texts=zstd.compress(raw)))

    assert list(batch.texts) == ["good", "", "", ""]
    assert batch.refused == {1: "not_unicode", 2: "nul_character", 3: "text_too_large"}


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
def test_refusal_names_the_reason(text: object, code: str) -> None:
    """Each text that cannot be embedded has its code; empty and long ones can be."""
    assert refusal(text) == code


def test_batch_beyond_the_limits_is_not_sent() -> None:
    """The producer refuses what the worker would, with the number and the limit."""
    with pytest.raises(BatchTooLarge, match=r"5,000 texts; the limit is 4,096"):
        EmbedBatch("job", 0, [""] * 5_000, SPEC).to_message()
    with pytest.raises(BatchTooLarge, match="bytes of text"):
        EmbedBatch("job", 0, ["x" * MAX_TEXT_BYTES] * 5, SPEC).to_message()


def test_largest_batch_is_sent() -> None:
    """The limits themselves are allowed: 4,096 texts and 4 MiB."""
    batch = EmbedBatch("job", 0, ["x" * 1024] * MAX_BATCH_TEXTS, SPEC)

    assert EmbedBatch.from_message(batch.to_message()) == batch


def test_model_card_survives_the_wire_and_newer_fields() -> None:
    """A card comes back, also from a version that knows more fields."""
    card = ModelCard("label", "ab" * 32, 384, 256, prompts={"query": "query: "})
    newer = msgpack.packb({**msgpack.unpackb(card.to_message()), "colour": "blue"})

    assert ModelCard.from_message(card.to_message()) == card
    assert ModelCard.from_message(newer) == card
    with pytest.raises(MalformedMessage):
        ModelCard.from_message(b"\xc1")
