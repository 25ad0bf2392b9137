"""Tests that forged messages are refused within the memory limits of the contract."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgpack
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from embedq.errors import BatchTooLarge, ContractError, MalformedMessage, UnknownSchema
from embedq.protocol.contract import (
    MAX_BATCH_TEXTS,
    MAX_RAW_BYTES,
    MAX_TEXT_BYTES,
    SCHEMA,
    VectorSpec,
)
from embedq.protocol.message import EmbedBatch

SPEC = VectorSpec(model="ab" * 32, dim=384, max_length=256)
TEXTS = ["plain", "", "emoji 🦀", "a" * 50_000]

#: Values of every type that msgpack can carry.
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
garbage = st.recursive(
    leaves | st.binary(max_size=50),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


def message(texts: list[str] = TEXTS, /, **changes: Any) -> dict[str, Any]:
    """Return the unpacked message of a batch with some fields replaced."""
    body = EmbedBatch("job", 7, texts, SPEC).to_message()
    unpacked: dict[str, Any] = msgpack.unpackb(msgpack.packb({**body, **changes}))
    return unpacked


def test_newer_schema_is_refused_with_the_next_step() -> None:
    with pytest.raises(UnknownSchema, match=rf"version {SCHEMA + 1}; .* {SCHEMA}\. Upgrade"):
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
def test_declared_sizes_over_the_limit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BatchTooLarge):
        EmbedBatch.from_message(message(**change))


@pytest.mark.parametrize("declared", [1024 * 1024, MAX_RAW_BYTES])
def test_decompression_bomb_is_refused_within_three_times_its_declared_size(declared: int) -> None:
    packer = zstd.ZstdCompressor(3)
    bomb = b"".join(packer.compress(bytes(2**20)) for _ in range(1024)) + packer.flush()
    forged = message(raw=declared, texts=bomb)
    tracemalloc.start()

    with pytest.raises(MalformedMessage, match="does not decompress to"):
        EmbedBatch.from_message(forged)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * declared + 2**20


def test_zstd_frame_with_a_128_mib_window_is_refused() -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 27}
    packer = zstd.ZstdCompressor(options=options)
    frame = packer.compress(bytes(100)) + packer.flush()

    with pytest.raises(MalformedMessage):
        EmbedBatch.from_message(message(raw=100, texts=frame))


@pytest.mark.parametrize(
    "change",
    [
        {"n": 3},
        {"n": 0},
        {"n": 5, "raw": 8, "texts": zstd.compress(bytes(8))},
        {"n": 4_000},
        {"raw": 50_000},
        {"texts": b""},
        {"texts": b"not zstd"},
        {"texts": zstd.compress(b"\xff" * 4)},
    ],
    ids=repr,
)
def test_inconsistent_lengths_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ContractError):
        EmbedBatch.from_message(message(**change))


def test_truncated_or_extended_zstd_frame_is_refused() -> None:
    packed = message()["texts"]

    for forged in (packed[:-1], packed[: len(packed) // 2], packed + b"more", packed * 2):
        with pytest.raises(ContractError):
            EmbedBatch.from_message(message(texts=forged))


@given(garbage)
def test_garbage_raises_only_contract_errors(body: object) -> None:
    with pytest.raises(ContractError):  # TypeError or KeyError would be a bug
        EmbedBatch.from_message(msgpack.unpackb(msgpack.packb(body), strict_map_key=False))


@given(st.sampled_from([*message()]), garbage | st.integers(-2, 20))
def test_garbage_in_one_field_is_parsed_or_refused(field: str, value: object) -> None:
    forged = message(["a", "b"], **{field: value})

    try:
        batch = EmbedBatch.from_message(forged)
    except ContractError as error:
        assert str(error)
    else:
        assert len(batch.texts) == 2


@given(st.sampled_from(range(7)), garbage)
def test_garbage_in_the_specification_is_parsed_or_refused(place: int, value: object) -> None:
    spec = list(message()["spec"])
    spec[place] = value

    try:
        batch = EmbedBatch.from_message(message(spec=spec))
    except ContractError:
        return
    assert list(map(type, batch.spec)) == list(map(type, SPEC))


def test_invalid_text_is_refused_without_its_batch() -> None:
    parts = [b"good", b"\xff\xfe", b"N\0L", b"x" * (MAX_TEXT_BYTES + 1)]
    raw = b"".join(len(part).to_bytes(4, "little") for part in parts) + b"".join(parts)

    batch = EmbedBatch.from_message(message(n=4, raw=len(raw), texts=zstd.compress(raw)))

    assert list(batch.texts) == ["good", "", "", ""]
    assert batch.refused == {1: "not_unicode", 2: "nul_character", 3: "text_too_large"}
