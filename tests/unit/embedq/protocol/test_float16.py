"""Tests of float16 vectors in values, calls and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support.redis import RedisProcess

from embedq import Client
from embedq.errors import SettingsError
from embedq.protocol.contract import Dtype, Outcome, VectorSpec
from embedq.protocol.values import OutcomeTable, decode, encode, split_rows
from embedq.testing import stub_vectors

TEXTS = [f"text {i}" for i in range(300)]


def test_float16_value_has_half_the_bytes_and_half_a_unit_of_error() -> None:
    # 2**-12 is half a unit in the last of eleven bits for components up to 1.
    vectors = stub_vectors(TEXTS)
    outcomes = OutcomeTable.from_outcomes([Outcome()] * len(TEXTS))

    whole = encode(vectors, outcomes, bytes(8))
    half = encode(vectors, outcomes, bytes(8), Dtype.FLOAT16)
    found = decode(half, bytes(8)).vectors

    assert len(whole) - len(half) == 2 * vectors.size
    assert found.dtype == np.float16
    assert np.abs(found.astype(np.float32) - vectors).max() <= 2**-12


def test_float16_values_hold_about_twice_the_rows() -> None:
    halves = list(split_rows(4_096, 384, Dtype.FLOAT16))

    assert halves[-1][1] == 4_096
    assert len(halves) <= 0.6 * len(list(split_rows(4_096, 384)))


def test_dtype_is_part_of_the_fingerprint() -> None:
    spec = VectorSpec("ab" * 32, 8, 16)

    assert spec.fingerprint() != spec._replace(dtype=Dtype.FLOAT16).fingerprint()


def test_client_with_float16_returns_rounded_float32_vectors(
    client: Client, shared_redis: RedisProcess
) -> None:
    with Client(settings=shared_redis.settings(dtype="float16")) as half:
        vectors, empty = half.encode(TEXTS), half.encode([])

    assert {str(each.dtype) for each in (vectors, empty)} == {"float16"}
    assert np.array_equal(vectors, stub_vectors(TEXTS).astype(np.float16))


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "parquet"])
def test_float16_outputs_hold_rounded_values_after_an_update(
    tmp_path: Path, client: Client, shared_redis: RedisProcess, suffix: str
) -> None:
    from embedq.bulk.request import EmbedRequest
    from embedq.bulk.run import EmbedRun
    from embedq.bulk.update import UpdateRun
    from embedq.cli.console import RunDisplay

    source, output = tmp_path / "in.txt", tmp_path / f"out.{suffix}"
    request = EmbedRequest(inputs=(str(source),), output=output)
    with Client(settings=shared_redis.settings(dtype="float16")) as half:
        for kind, texts in ((EmbedRun, TEXTS[:50]), (UpdateRun, TEXTS[10:80])):
            source.write_text("\n".join(texts) + "\n")
            with RunDisplay(quiet=True) as display:
                kind(half, request, display, 0.0).run()

    if suffix == "npy":
        found = np.load(output)
        assert found.dtype == np.float16
    elif suffix == "jsonl":
        lines = output.read_text().splitlines()
        found = np.array([json.loads(line)["vector"] for line in lines])
    else:
        import pyarrow.parquet as pq

        found = np.array(pq.read_table(output).column("vector").to_pylist())
    assert np.array_equal(found, stub_vectors(TEXTS[10:80]).astype(np.float16))


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_DTYPE"):
        Client(dtype="float8")
