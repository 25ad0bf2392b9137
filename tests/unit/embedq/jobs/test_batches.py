"""Texts -> batches: all of them, in order, within every bound, and always the same way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from embedq.jobs.batches import CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS, RAMP, batch_tokens, split
from embedq.protocol.contract import MAX_BATCH_BYTES, MAX_TEXT_BYTES, VectorSpec
from embedq.protocol.message import EmbedBatch

SPEC = VectorSpec("ab" * 32, 384, 256)
LIMITS = {"max_texts": 8, "max_tokens": 200, "max_length": 64}
anything = st.lists(st.text(max_size=200) | st.none() | st.integers(), max_size=60)


@given(anything)
def test_every_text_is_in_one_place(texts: list[object]) -> None:
    """Slices are numbered, consecutive and cover every text; refused ones keep their place."""
    slices = list(split(texts, **LIMITS))

    assert [piece.index for piece in slices] == list(range(len(slices)))
    assert sum(map(len, slices)) == len(texts)
    at = 0
    for piece in slices:
        assert piece.start == at
        for offset, text in enumerate(piece.texts):
            original = texts[at + offset]
            assert text == ("" if offset in piece.refused else original)
        at += len(piece)


@given(anything)
def test_same_texts_give_the_same_split(texts: list[object]) -> None:
    """The split depends on the texts alone, so a resumed run has the same batches."""
    assert list(split(iter(texts), **LIMITS)) == list(split(texts, **LIMITS))


@given(anything)
def test_every_batch_can_be_sent(texts: list[object]) -> None:
    """What is split can be encoded, and comes back equal."""
    for piece in split(texts, **LIMITS):
        batch = EmbedBatch("job", piece.index, piece.texts, SPEC, piece.refused)
        assert EmbedBatch.from_message(batch.to_message()) == batch


def test_count_of_texts_is_bounded_and_ramps_up() -> None:
    """The first batches are small, so that results come soon; then each is full."""
    sizes = [
        len(piece) for piece in split(["x"] * 100, max_texts=16, max_tokens=10**6, max_length=256)
    ]

    assert sizes[: len(RAMP)] == [int(16 * share) for share in RAMP]
    assert set(sizes[len(RAMP) : -1]) == {16}


def test_long_texts_make_batches_of_fewer() -> None:
    """Work is counted in tokens: long texts fill a batch sooner than short ones."""
    limits = {"max_texts": 1000, "max_tokens": 1000, "max_length": 256}
    short = list(split(["ab"] * 2000, **limits))
    long = list(split(["word " * 100] * 2000, **limits))

    assert len(long) > 10 * len(short)


def test_bytes_are_bounded_whatever_the_settings() -> None:
    """Texts of the largest size never add up to more than a batch may hold."""
    texts = ["x" * MAX_TEXT_BYTES] * 9

    slices = list(split(texts, max_texts=4096, max_tokens=10**6, max_length=256))

    assert all(sum(map(len, piece.texts)) <= MAX_BATCH_BYTES for piece in slices)
    assert sum(map(len, slices)) == 9


def test_stream_is_pulled_as_far_as_needed() -> None:
    """The first batch is there before the stream ends: memory does not grow with the input."""

    def endless() -> object:
        while True:
            yield "text"

    first = next(split(endless(), **LIMITS))  # type: ignore[arg-type] # a generator

    assert len(first) == 1


def test_text_is_in_no_representation() -> None:
    """A slice in a traceback or a log shows no text."""
    [piece] = split(["Kundengeheimnis"], **LIMITS)

    assert "geheimnis" not in repr(piece)


def test_batches_suit_the_devices_of_the_fleet() -> None:
    """A second of a fast device is many more tokens than one of a CPU; a setting wins over both."""
    slow = batch_tokens(0, ["cpu", "cpu"])
    fast = batch_tokens(0, ["cpu", "npu"])

    assert (slow, fast) == (CPU_BATCH_TOKENS, DEVICE_BATCH_TOKENS)
    assert batch_tokens(0, []) == slow
    assert batch_tokens(500, ["npu"]) == 500
