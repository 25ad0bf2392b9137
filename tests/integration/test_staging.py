"""Values staged before their commit are invisible until then and are never left in Redis."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from redis import Redis
from tests.support.redis import JOB_TTL_S, RedisProcess, job_keys
from tests.support.stub_batches import STUB_SPEC, stub_batch

from embedq.protocol.values import decode, split_rows
from embedq.store.ledger import STAGED_TTL_S, Ledger, StagedValues, StagedValuesExpired
from embedq.testing import stub_vectors
from embedq_worker.engines.stub import StubEngine, StubTokenizer
from embedq_worker.inference.embedder import Embedder
from embedq_worker.pool_process.commit import ResultUploader


def stage(results: Redis, index: int = 0, values: tuple[bytes, ...] = (b"a", b"b")) -> StagedValues:
    staging = StagedValues(results, "job", index)
    for part, value in enumerate(values):
        assert staging.write(part, value)
    return staging


def test_staged_and_inline_values_are_committed_in_order(ledger: Ledger, results: Redis) -> None:
    keys = stage(results).keys

    committed = ledger.commit(0, [keys[1], b"inline", keys[0]])

    assert committed is True
    [commit] = ledger.read_commits(count=10, block_ms=1)
    assert ledger.fetch_values(commit) == [b"b", b"inline", b"a"]
    assert 0 < results.ttl("embedq:{job}:v:0:0") <= JOB_TTL_S
    ledger.acknowledge([commit])
    left = {b"embedq:{job}:" + name for name in (b"meta", b"bits", b"commits")}
    assert job_keys(results) == left


def test_staged_values_expire_and_do_not_commit_the_batch(ledger: Ledger, results: Redis) -> None:
    staging = stage(results)

    assert not ledger.is_committed(0)
    assert ledger.read_commits(count=10, block_ms=1) == []
    ttls = [results.ttl(key) for key in [*staging.keys.values(), "embedq:{job}:staged"]]
    assert all(0 < ttl <= STAGED_TTL_S for ttl in ttls), ttls


@pytest.mark.parametrize("end", ["committed", "dropped"])
def test_late_commit_deletes_its_staged_values(end: str, ledger: Ledger, results: Redis) -> None:
    """The second writer of a batch, or one whose job was deleted, leaves no keys."""
    staging = stage(results)
    # As if written after the end of the job.
    results.srem("embedq:{job}:staged", *staging.keys.values())
    ledger.commit(0, [b"first"]) if end == "committed" else ledger.drop()

    answer = ledger.commit(0, list(staging.keys.values()))

    assert answer is (False if end == "committed" else None)
    assert not results.exists(*staging.keys.values())


def test_commit_of_expired_values_writes_nothing(ledger: Ledger, results: Redis) -> None:
    staging = stage(results)
    results.unlink(staging.keys[0])

    with pytest.raises(StagedValuesExpired):
        ledger.commit(0, [b"inline", *staging.keys.values()])

    assert not ledger.is_committed(0)
    assert not results.exists("embedq:{job}:v:0:0")


def test_drop_deletes_staged_values(ledger: Ledger, results: Redis) -> None:
    stage(results)

    ledger.drop()

    assert job_keys(results) == set()


@pytest.mark.parametrize("end", ["drop", "commit"])
def test_values_for_an_ended_job_are_not_staged(end: str, ledger: Ledger, results: Redis) -> None:
    staging = stage(results)
    if end == "commit":
        ledger.commit(0, [b"x"])
    else:
        ledger.drop()

    accepted = staging.write(2, b"late")

    assert not accepted
    assert not [key for key in job_keys(results) if b":s:" in key or b"staged" in key]


def test_full_redis_accepts_the_commit_of_staged_values(ledger: Ledger, results: Redis) -> None:
    keys = stage(results).keys
    results.config_set("maxmemory", 1)

    committed = ledger.commit(0, list(keys.values()))

    assert committed is True
    results.config_set("maxmemory", 0)


def test_upload_stages_every_value_before_the_commit(ledger: Ledger, results: Redis) -> None:
    """A text that is refused does not delay a value."""
    texts = [f"text {i}" for i in range(700)]
    batch = stub_batch(texts, refused={5: "nul_character"})
    embedder = Embedder(StubTokenizer(), StubEngine(), token_budget=256)
    with ThreadPoolExecutor(1) as thread:
        upload = ResultUploader(batch, StagedValues(results, "job", 0), thread)

        vectors, outcomes = embedder.embed(batch, sink=upload)
        values = upload.values(vectors, outcomes)
    embedder.close()

    pieces = list(split_rows(len(texts), STUB_SPEC.dim))
    assert len(values) == len(pieces) >= 3
    assert all(isinstance(value, str) for value in values)
    assert ledger.commit(0, values) is True
    [commit] = ledger.read_commits(count=10, block_ms=1)
    fetched = [value for value in ledger.fetch_values(commit) if value]
    found = [decode(value, STUB_SPEC.fingerprint()).vectors for value in fetched]
    expected = stub_vectors(texts)
    expected[5] = np.nan
    assert np.concatenate(found).tobytes() == expected.tobytes()


def test_upload_without_redis_leaves_every_value_to_the_commit(redis: RedisProcess) -> None:
    texts = [f"text {i}" for i in range(700)]
    batch = stub_batch(texts)
    embedder = Embedder(StubTokenizer(), StubEngine(), token_budget=256)
    with redis.open() as results, ThreadPoolExecutor(1) as thread:
        redis.stop()
        upload = ResultUploader(batch, StagedValues(results, "job", 0), thread)

        vectors, outcomes = embedder.embed(batch, sink=upload)
        values = upload.values(vectors, outcomes)
        upload.discard()
    embedder.close()

    assert all(isinstance(value, bytes) for value in values)
