"""The ledger in a real Redis commits each batch once and atomically, and every key expires."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from tests.support.redis import JOB_TTL_S, RedisProcess, job_keys

from embedq.store.connection import retryable_reason
from embedq.store.ledger import JOBS_KEY, Attempt, AttemptLog, Commit, Ledger, TextAttempts


def test_undone_attempt_is_not_counted(ledger: Ledger) -> None:
    """The count never becomes negative."""
    assert ledger.start_attempt(0) == (Attempt.RUN, 1)
    ledger.undo_attempt(0)
    ledger.undo_attempt(0)
    assert ledger.start_attempt(0) == (Attempt.RUN, 1)
    assert ledger.start_attempt(0) == (Attempt.RUN, 2)


def test_undo_after_the_end_of_the_job_writes_no_key(ledger: Ledger, results: Redis) -> None:
    """The key would never expire."""
    ledger.start_attempt(0)
    ledger.drop()

    ledger.undo_attempt(0)

    assert job_keys(results) == set()


def test_first_of_two_concurrent_commits_is_accepted(redis: RedisProcess, ledger: Ledger) -> None:
    barrier = threading.Barrier(2)
    accepted: dict[bytes, list[bool | None]] = {b"one": [], b"two": []}

    def commit_all(value: bytes) -> None:
        with redis.open() as client:
            thread_ledger = Ledger(client, "job")
            for index in range(100):
                barrier.wait(10)
                accepted[value].append(thread_ledger.commit(index, [value]))

    threads = [threading.Thread(target=commit_all, args=(value,)) for value in accepted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    commits = ledger.read_commits(count=1000, block_ms=1)
    assert sorted(commit.index for commit in commits) == list(range(100))
    for commit in commits:
        [value] = ledger.fetch_values(commit)
        assert value is not None
        assert accepted[value][commit.index] is True
        assert accepted[b"two" if value == b"one" else b"one"][commit.index] is False


def test_values_are_read_in_order_and_deleted_by_acknowledge(
    ledger: Ledger, results: Redis
) -> None:
    ledger.commit(7, [b"a", b"b", b"c"])

    [commit] = ledger.read_commits(count=10, block_ms=1)
    values = ledger.fetch_values(commit)
    ledger.acknowledge([commit])

    assert (commit.index, values) == (7, [b"a", b"b", b"c"])
    assert ledger.fetch_values(commit) == [None] * 3
    assert ledger.read_commits(count=10, block_ms=1) == []
    assert ledger.is_committed(7)


def test_every_key_of_a_job_has_a_time_to_live(ledger: Ledger, results: Redis) -> None:
    ledger.start_attempt(1)
    ledger.commit(0, [b"value"])
    ledger.commit(2, [b"other"])
    AttemptLog(results, "job").start(1, 5, "worker:7")
    ledger.invalidate(ledger.read_commits(count=1, block_ms=1)[0])

    ttls = {key: results.ttl(key) for key in job_keys(results)}

    assert len(ttls) == 6
    assert all(ttl > 0 for ttl in ttls.values()), ttls
    assert all(ttl <= JOB_TTL_S for key, ttl in ttls.items() if b"suspects" not in key), ttls


def test_attempt_log_separates_processes_and_batches(ledger: Ledger, results: Redis) -> None:
    attempts = AttemptLog(results, "job")
    attempts.start(1, 5, "worker:7")
    attempts.start(1, 6, "worker:8")
    attempts.start(11, 9, "worker:7")
    attempts.add_failure(1, 5, 4)
    attempts.add_failure(11, 5, 1)
    attempts.mark_unfinished(1, 6, "worker:8")
    before = attempts.fetch(1)

    attempts.end(1, 5, "worker:7", cleared=True)

    assert before == TextAttempts({"worker:7": 5}, {"worker:8": 6}, {5: 4})
    assert attempts.fetch(1) == TextAttempts({}, {"worker:8": 6}, {})
    assert attempts.fetch(11) == TextAttempts({"worker:7": 9}, {}, {5: 1})


def test_commit_after_the_end_of_the_job_writes_no_key(ledger: Ledger, results: Redis) -> None:
    ledger.drop()

    AttemptLog(results, "job").start(0, 1, "worker:7")

    assert ledger.start_attempt(0) == (Attempt.JOB_EXPIRED, 0)
    assert ledger.commit(0, [b"late"]) is None
    assert job_keys(results) == set()


@pytest.mark.parametrize("action", ["invalidate", "keep_alive", "drop"])
def test_deleted_job_is_not_created_again(action: str, ledger: Ledger, results: Redis) -> None:
    arguments: dict[str, list[object]] = {"invalidate": [Commit(b"0-1", 0, 1)], "keep_alive": [60]}
    ledger.drop()

    getattr(ledger, action)(*arguments.get(action, []))

    assert job_keys(results) == set()
    assert results.zrange(JOBS_KEY, 0, -1) == []


def test_drop_deletes_commits_that_were_not_read(ledger: Ledger, results: Redis) -> None:
    for index in range(50):
        ledger.commit(index, [b"x", b"y"])

    ledger.drop()

    assert job_keys(results) == set()


def test_deliveries_are_counted_until_the_commit(ledger: Ledger) -> None:
    deliveries = [ledger.start_attempt(3) for _ in range(3)]
    ledger.commit(3, [b"value"])

    assert deliveries == [(Attempt.RUN, 1), (Attempt.RUN, 2), (Attempt.RUN, 3)]
    assert ledger.start_attempt(3) == (Attempt.ALREADY_DONE, 0)


def test_invalidated_batch_can_be_committed_again(ledger: Ledger) -> None:
    ledger.commit(3, [b"damaged", b"intact"])
    [commit] = ledger.read_commits(count=10, block_ms=1)

    ledger.invalidate(commit)

    assert ledger.fetch_values(commit) == [None, None]
    assert ledger.read_commits(count=10, block_ms=1) == []
    assert ledger.start_attempt(3) == (Attempt.RUN, 1)
    assert ledger.commit(3, [b"again"]) is True


def test_second_open_does_not_delete_commits(ledger: Ledger) -> None:
    ledger.commit(0, [b"value"])

    ledger.open(fingerprint=bytes(8), ttl_s=JOB_TTL_S)

    assert ledger.commit(0, [b"other"]) is False


def test_full_redis_refuses_a_whole_commit(ledger: Ledger, results: Redis) -> None:
    values = [bytes(100_000)] * 3
    ledger.commit(0, values)
    before = {key: results.dump(key) for key in job_keys(results)}
    results.config_set("maxmemory", 1)

    with pytest.raises(ResponseError) as caught:
        ledger.commit(1, values)

    assert retryable_reason(caught.value) == "Redis is full (maxmemory)"
    assert {key: results.dump(key) for key in job_keys(results)} == before
    results.config_set("maxmemory", 0)
    assert ledger.commit(1, values) is True


def test_open_in_a_full_redis_can_be_retried(redis: RedisProcess, results: Redis) -> None:
    results.config_set("maxmemory", 1)

    with pytest.raises(Exception) as caught:  # the class is checked below
        Ledger(results, "job").open(fingerprint=bytes(8), ttl_s=JOB_TTL_S)

    assert retryable_reason(caught.value) == "Redis is full (maxmemory)"


@pytest.mark.parametrize(
    "fields",
    [{"x": "1"}, {"i": "a", "v": "b"}, {"i": "-1", "v": "1"}, {"i": "9" * 30, "v": "1"}],
    ids=repr,
)
def test_forged_stream_entry_is_read_and_deleted(
    fields: dict[Any, Any], ledger: Ledger, results: Redis
) -> None:
    results.xadd("embedq:{job}:commits", fields, id="1-1")
    ledger.commit(3, [b"value"])

    forged, real = ledger.read_commits(count=10, block_ms=1)
    ledger.acknowledge([forged])

    assert (forged.index, real.index) == (-1, 3)
    assert ledger.read_commits(count=10, block_ms=1) == [real]


@pytest.mark.parametrize("n_values", ["999999999999", "-4", "4097", "many"])
def test_forged_number_of_values_is_read_as_none(
    n_values: str, ledger: Ledger, results: Redis
) -> None:
    """It must cost no memory, neither in `fetch_values` nor in `drop`."""
    results.xadd("embedq:{job}:commits", {"i": 3, "v": n_values})

    [commit] = ledger.read_commits(count=10, block_ms=1)
    ledger.drop()

    assert ledger.fetch_values(commit) == []
    assert not results.exists("embedq:{job}:commits")


def test_invalid_fields_of_the_attempt_log_are_ignored(ledger: Ledger, results: Redis) -> None:
    attempts = AttemptLog(results, "job")
    attempts.add_failure(0, 4, 2)
    others = {"0": 1, "0:x": 1, "0:5": "y", b"\xff": 1, "": 1, "0@p": "z"}
    results.hset("embedq:{job}:suspects", mapping=others)  # type: ignore[arg-type] # bytes as well

    assert attempts.fetch(0) == TextAttempts(points={4: 2})
