"""Tests of splitting texts into batches."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedq.jobs.batches import CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS, RAMP, batch_tokens, split
from embedq.protocol.contract import MAX_BATCH_BYTES, MAX_TEXT_BYTES, VectorSpec
from embedq.protocol.message import EmbedBatch

SPEC = VectorSpec("ab" * 32, 384, 256)
LIMITS = {"max_texts": 8, "max_tokens": 200, "max_length": 64}
text_lists = st.lists(st.text(max_size=200) | st.none() | st.integers(), max_size=60)


@given(text_lists)
def test_batches_cover_all_texts_in_order(texts: list[object]) -> None:
    batches = list(split(texts, **LIMITS))

    assert [batch.index for batch in batches] == list(range(len(batches)))
    assert sum(map(len, batches)) == len(texts)
    at = 0
    for batch in batches:
        assert batch.start == at
        for offset, text in enumerate(batch.texts):
            original = texts[at + offset]
            assert text == ("" if offset in batch.refused else original)
        at += len(batch)


@given(text_lists)
def test_split_depends_on_the_texts_alone(texts: list[object]) -> None:
    assert list(split(iter(texts), **LIMITS)) == list(split(texts, **LIMITS))


@given(text_lists)
def test_every_batch_survives_the_wire(texts: list[object]) -> None:
    for batch in split(texts, **LIMITS):
        sent = EmbedBatch("job", batch.index, batch.texts, SPEC, batch.refused)
        assert EmbedBatch.from_message(sent.to_message()) == sent


def test_first_batches_are_smaller_and_the_others_full() -> None:
    sizes = [
        len(batch) for batch in split(["x"] * 100, max_texts=16, max_tokens=10**6, max_length=256)
    ]

    assert sizes[: len(RAMP)] == [int(16 * share) for share in RAMP]
    assert set(sizes[len(RAMP) : -1]) == {16}


def test_batches_of_long_texts_hold_fewer_texts() -> None:
    limits = {"max_texts": 1000, "max_tokens": 1000, "max_length": 256}
    short = list(split(["ab"] * 2000, **limits))
    long = list(split(["word " * 100] * 2000, **limits))

    assert len(long) > 10 * len(short)


def test_batch_never_exceeds_the_byte_limit() -> None:
    texts = ["x" * MAX_TEXT_BYTES] * 9

    batches = list(split(texts, max_texts=4096, max_tokens=10**6, max_length=256))

    assert all(sum(map(len, batch.texts)) <= MAX_BATCH_BYTES for batch in batches)
    assert sum(map(len, batches)) == 9


def test_first_batch_is_returned_before_the_input_ends() -> None:
    def endless() -> object:
        while True:
            yield "text"

    first = next(split(endless(), **LIMITS))  # type: ignore[arg-type] # a generator

    assert len(first) == 1


def test_representation_of_a_batch_shows_no_text() -> None:
    [batch] = split(["Kundengeheimnis"], **LIMITS)

    assert "geheimnis" not in repr(batch)


def test_batch_tokens_follow_the_devices_unless_set() -> None:
    slow = batch_tokens(0, ["cpu", "cpu"])
    fast = batch_tokens(0, ["cpu", "npu"])

    assert (slow, fast) == (CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS)
    assert batch_tokens(0, []) == slow
    assert batch_tokens(500, ["npu"]) == 500
