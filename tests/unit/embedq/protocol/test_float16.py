"""float16: half the bytes in Redis and on disk, rounded once, and never mixed with float32."""

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


def test_value_holds_half_the_bytes() -> None:
    """A component of a unit vector is off by at most 2**-12: half a unit of eleven bits."""
    vectors = stub_vectors(TEXTS)
    outcomes = OutcomeTable.from_outcomes([Outcome()] * len(TEXTS))

    whole = encode(vectors, outcomes, bytes(8))
    half = encode(vectors, outcomes, bytes(8), Dtype.FLOAT16)
    found = decode(half, bytes(8)).vectors

    assert len(whole) - len(half) == 2 * vectors.size
    assert found.dtype == np.float16
    assert np.abs(found.astype(np.float32) - vectors).max() <= 2**-12


def test_pieces_of_a_batch_hold_twice_the_rows() -> None:
    """Values are filled by bytes, so there are half as many."""
    halves = list(split_rows(4_096, 384, Dtype.FLOAT16))

    assert halves[-1][1] == 4_096
    assert len(halves) <= 0.6 * len(list(split_rows(4_096, 384)))


def test_type_is_part_of_the_fingerprint() -> None:
    """A float16 run never takes float32 vectors for its own."""
    spec = VectorSpec("ab" * 32, 8, 16)

    assert spec.fingerprint() != spec._replace(dtype=Dtype.FLOAT16).fingerprint()


def test_caller_gets_float16(client: Client, shared_redis: RedisProcess) -> None:
    """The worker rounds its float32 once; failed texts and empty calls have the type too."""
    with Client(settings=shared_redis.settings(dtype="float16")) as half:
        vectors, none = half.encode(TEXTS), half.encode([])

    assert {str(each.dtype) for each in (vectors, none)} == {"float16"}
    assert np.array_equal(vectors, stub_vectors(TEXTS).astype(np.float16))


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_outputs_hold_the_rounded_values(
    tmp_path: Path, client: Client, shared_redis: RedisProcess, ending: str
) -> None:
    """npy as float16; the others as the same numbers. An update keeps and adds such rows."""
    from embedq.bulk.request import EmbedRequest
    from embedq.bulk.run import EmbedRun
    from embedq.bulk.update import UpdateRun
    from embedq.cli.console import RunDisplay

    source, output = tmp_path / "in.txt", tmp_path / f"out.{ending}"
    request = EmbedRequest(inputs=(str(source),), output=output)
    with Client(settings=shared_redis.settings(dtype="float16")) as half:
        for kind, texts in ((EmbedRun, TEXTS[:50]), (UpdateRun, TEXTS[10:80])):
            source.write_text("\n".join(texts) + "\n")
            with RunDisplay(quiet=True) as display:
                kind(half, request, display, 0.0).run()

    if ending == "npy":
        found = np.load(output)
        assert found.dtype == np.float16
    elif ending == "jsonl":
        lines = output.read_text().splitlines()
        found = np.array([json.loads(line)["vector"] for line in lines])
    else:
        import pyarrow.parquet as pq

        found = np.array(pq.read_table(output).column("vector").to_pylist())
    assert np.array_equal(found, stub_vectors(TEXTS[10:80]).astype(np.float16))


def test_unknown_type_is_refused() -> None:
    """The message names what there is."""
    with pytest.raises(SettingsError, match="EMBEDQ_DTYPE"):
        Client(dtype="float8")
