"""The ledger in a real Redis: one commit a batch, all or nothing, and nothing lives for ever."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ResponseError
from tests.support.redis import JOB_TTL_S, RedisProcess, job_keys

from embedq.store.connection import retryable_reason
from embedq.store.dead_letters import AttemptLog, TextAttempts
from embedq.store.ledger import JOBS_KEY, Attempt, Commit, Ledger


def test_forgiven_try_is_not_counted(ledger: Ledger) -> None:
    """A batch whose device failed under it begins afresh; a try never goes below none."""
    assert ledger.start_attempt(0) == (Attempt.RUN, 1)
    ledger.undo_attempt(0)
    ledger.undo_attempt(0)
    assert ledger.start_attempt(0) == (Attempt.RUN, 1)
    assert ledger.start_attempt(0) == (Attempt.RUN, 2)


def test_batch_of_a_gone_job_is_forgiven_without_a_trace(ledger: Ledger, results: Redis) -> None:
    """A key written for a job that is gone would live for ever."""
    ledger.start_attempt(0)
    ledger.drop()

    ledger.undo_attempt(0)

    assert job_keys(results) == set()


def test_first_of_two_writers_wins(redis: RedisProcess, ledger: Ledger) -> None:
    """Of two threads that commit the same batch with different values, one is told that it did."""
    barrier = threading.Barrier(2)
    told: dict[bytes, list[bool | None]] = {b"one": [], b"two": []}

    def commit_all(value: bytes) -> None:
        with redis.open() as client:
            own = Ledger(client, "job")
            for index in range(100):
                barrier.wait(10)
                told[value].append(own.commit(index, [value]))

    threads = [threading.Thread(target=commit_all, args=(value,)) for value in told]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    commits = ledger.read_commits(count=1000, block_ms=1)
    assert sorted(commit.index for commit in commits) == list(range(100))
    for commit in commits:
        [value] = ledger.fetch_values(commit)
        assert value is not None
        assert told[value][commit.index] is True
        assert told[b"two" if value == b"one" else b"one"][commit.index] is False


def test_values_come_back_in_order_and_are_taken(ledger: Ledger, results: Redis) -> None:
    """A batch of several values is read in their order; taking it deletes them and its entry."""
    ledger.commit(7, [b"a", b"b", b"c"])

    [commit] = ledger.read_commits(count=10, block_ms=1)
    values = ledger.fetch_values(commit)
    ledger.acknowledge([commit])

    assert (commit.index, values) == (7, [b"a", b"b", b"c"])
    assert ledger.fetch_values(commit) == [None] * 3
    assert ledger.read_commits(count=10, block_ms=1) == []
    assert ledger.is_committed(7)


def test_every_key_of_a_job_has_a_time_to_live(ledger: Ledger, results: Redis) -> None:
    """Whatever a job writes fades by itself if its producer never comes back."""
    ledger.start_attempt(1)
    ledger.commit(0, [b"value"])
    ledger.commit(2, [b"other"])
    AttemptLog(results, "job").start(1, 5, "worker:7")
    ledger.invalidate(ledger.read_commits(count=1, block_ms=1)[0])

    lives = {key: results.ttl(key) for key in job_keys(results)}

    assert len(lives) == 6
    assert all(ttl > 0 for ttl in lives.values()), lives
    assert all(ttl <= JOB_TTL_S for key, ttl in lives.items() if b"suspects" not in key), lives


def test_notes_on_suspects_are_kept_by_process_and_batch(ledger: Ledger, results: Redis) -> None:
    """Two processes at one batch do not wipe out each other's notes, nor those of batch 11."""
    suspects = AttemptLog(results, "job")
    suspects.start(1, 5, "worker:7")
    suspects.start(1, 6, "worker:8")
    suspects.start(11, 9, "worker:7")
    suspects.add_failure(1, 5, 4)
    suspects.add_failure(11, 5, 1)
    suspects.mark_unfinished(1, 6, "worker:8")
    before = suspects.fetch(1)

    suspects.end(1, 5, "worker:7", cleared=True)

    assert before == TextAttempts({"worker:7": 5}, {"worker:8": 6}, {5: 4})
    assert suspects.fetch(1) == TextAttempts({}, {"worker:8": 6}, {})
    assert suspects.fetch(11) == TextAttempts({"worker:7": 9}, {}, {5: 1})


def test_commit_after_the_end_writes_nothing(ledger: Ledger, results: Redis) -> None:
    """A batch of a dropped job is told so, and leaves no trace."""
    ledger.drop()

    AttemptLog(results, "job").start(0, 1, "worker:7")

    assert ledger.start_attempt(0) == (Attempt.JOB_EXPIRED, 0)
    assert ledger.commit(0, [b"late"]) is None
    assert job_keys(results) == set()


@pytest.mark.parametrize("action", ["invalidate", "keep_alive", "drop"])
def test_job_that_is_gone_stays_gone(action: str, ledger: Ledger, results: Redis) -> None:
    """What a producer does to a job that has expired brings no key back."""
    arguments: dict[str, list[object]] = {"invalidate": [Commit(b"0-1", 0, 1)], "keep_alive": [60]}
    ledger.drop()

    getattr(ledger, action)(*arguments.get(action, []))

    assert job_keys(results) == set()
    assert results.zrange(JOBS_KEY, 0, -1) == []


def test_drop_deletes_what_nobody_read(ledger: Ledger, results: Redis) -> None:
    """Commits that were never taken go with the job."""
    for index in range(50):
        ledger.commit(index, [b"x", b"y"])

    ledger.drop()

    assert job_keys(results) == set()


def test_begin_counts_deliveries_until_the_commit(ledger: Ledger) -> None:
    """Each delivery of a batch counts; a committed one is not begun again."""
    deliveries = [ledger.start_attempt(3) for _ in range(3)]
    ledger.commit(3, [b"value"])

    assert deliveries == [(Attempt.RUN, 1), (Attempt.RUN, 2), (Attempt.RUN, 3)]
    assert ledger.start_attempt(3) == (Attempt.ALREADY_DONE, 0)


def test_forgotten_batch_is_computed_again(ledger: Ledger) -> None:
    """Nothing is left of a commit that was taken back; the batch is begun and committed again."""
    ledger.commit(3, [b"damaged", b"whole"])
    [commit] = ledger.read_commits(count=10, block_ms=1)

    ledger.invalidate(commit)

    assert ledger.fetch_values(commit) == [None, None]
    assert ledger.read_commits(count=10, block_ms=1) == []
    assert ledger.start_attempt(3) == (Attempt.RUN, 1)
    assert ledger.commit(3, [b"again"]) is True


def test_opening_again_changes_nothing(ledger: Ledger) -> None:
    """A producer that repeats its opening keeps what is committed."""
    ledger.commit(0, [b"value"])

    ledger.open(fingerprint=bytes(8), ttl_s=JOB_TTL_S)

    assert ledger.commit(0, [b"other"]) is False


def test_full_redis_takes_all_of_a_commit_or_nothing(ledger: Ledger, results: Redis) -> None:
    """Under memory pressure the commit writes no byte, says why, and succeeds later."""
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


def test_opening_in_a_full_redis_is_a_wait(redis: RedisProcess, results: Redis) -> None:
    """A job that cannot be opened for want of memory says what it waits for."""
    results.config_set("maxmemory", 1)

    with pytest.raises(Exception) as caught:  # which class it is, is the point below
        Ledger(results, "job").open(fingerprint=bytes(8), ttl_s=JOB_TTL_S)

    assert retryable_reason(caught.value) == "Redis is full (maxmemory)"


@pytest.mark.parametrize(
    "fields",
    [{"x": "1"}, {"i": "a", "v": "b"}, {"i": "-1", "v": "1"}, {"i": "9" * 30, "v": "1"}],
    ids=repr,
)
def test_entry_of_no_batch_is_taken_and_forgotten(
    fields: dict[Any, Any], ledger: Ledger, results: Redis
) -> None:
    """An entry that no worker wrote stops nobody from reading those behind it."""
    results.xadd("embedq:{job}:commits", fields, id="1-1")
    ledger.commit(3, [b"value"])

    forged, real = ledger.read_commits(count=10, block_ms=1)
    ledger.acknowledge([forged])

    assert (forged.index, real.index) == (-1, 3)
    assert ledger.read_commits(count=10, block_ms=1) == [real]


@pytest.mark.parametrize("n_values", ["999999999999", "-4", "4097", "many"])
def test_values_beyond_the_contract_are_none(n_values: str, ledger: Ledger, results: Redis) -> None:
    """A forged count of values costs no memory, neither in reading nor in dropping the job."""
    results.xadd("embedq:{job}:commits", {"i": 3, "v": n_values})

    [commit] = ledger.read_commits(count=10, block_ms=1)
    ledger.drop()

    assert ledger.fetch_values(commit) == []
    assert not results.exists("embedq:{job}:commits")


def test_notes_that_are_none_are_passed_over(ledger: Ledger, results: Redis) -> None:
    """Whatever else stands among the notes of a job, its batches are still tried."""
    suspects = AttemptLog(results, "job")
    suspects.add_failure(0, 4, 2)
    others = {"0": 1, "0:x": 1, "0:5": "y", b"\xff": 1, "": 1, "0@p": "z"}
    results.hset("embedq:{job}:suspects", mapping=others)  # type: ignore[arg-type] # bytes as well

    assert suspects.fetch(0) == TextAttempts(charges={4: 2})
