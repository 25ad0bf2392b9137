"""Tests of waiting for Redis and retrying operations."""

from __future__ import annotations

import math
import time

import pytest
from redis import exceptions

from embedq.errors import QueueUnavailable
from embedq.store.connection import RedisConnection, retryable_reason


class Flaky:
    """Raises the given errors in turn, then returns a value."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    def __call__(self) -> str:
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (exceptions.ConnectionError("refused"), "Redis cannot be reached"),
        (exceptions.TimeoutError("slow"), "Redis cannot be reached"),
        (exceptions.BusyLoadingError("loading"), "Redis cannot be reached"),
        (exceptions.OutOfMemoryError("full"), "Redis is full (maxmemory)"),
        (exceptions.ResponseError("OOM ... 'maxmemory'"), "Redis is full (maxmemory)"),
        (
            exceptions.ReadOnlyError("replica"),
            "Redis refuses writes (a replica, a failover or a full disk)",
        ),
        (exceptions.ResponseError("MISCONF Errors writing"), "Redis cannot write to its disk"),
        (exceptions.AuthenticationError("password"), None),
        (exceptions.NoPermissionError("user"), None),
        (exceptions.ResponseError("WRONGTYPE"), None),
    ],
)
def test_only_temporary_errors_are_retried(error: Exception, reason: str | None) -> None:
    assert retryable_reason(error) == reason


def test_failed_operation_is_retried_and_reported_once() -> None:
    reported: list[str] = []
    redis = RedisConnection.open("redis://host", retry_timeout_s=10, on_wait=reported.append)

    answer = redis.call(Flaky(exceptions.ConnectionError("a"), exceptions.OutOfMemoryError("b")))

    assert answer == "answer"
    assert reported == ["Redis cannot be reached at redis://host; waiting (0 s so far)."]


def test_wait_without_on_wait_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    RedisConnection.open("redis://host", retry_timeout_s=10).call(
        Flaky(exceptions.ConnectionError("a"))
    )

    assert "redis_retry reason=Redis cannot be reached at redis://host" in caplog.text


@pytest.mark.parametrize(("retry_timeout_s", "deadline_s"), [(0.5, 60.0), (60.0, 0.5)])
def test_timeout_and_deadline_end_with_the_next_step(
    retry_timeout_s: float, deadline_s: float
) -> None:
    began = time.monotonic()
    redis = RedisConnection.open("redis://:secret@host", retry_timeout_s=retry_timeout_s)
    redis.deadline = began + deadline_s

    with pytest.raises(
        QueueUnavailable, match=r"at redis://:\*\*\*@host.*Start Redis, or set EMBEDQ_BR"
    ):
        redis.call(Flaky(*[exceptions.ConnectionError("refused")] * 50))

    assert time.monotonic() - began < 2


@pytest.mark.parametrize(("retry_timeout_s", "deadline"), [(0.0, math.inf), (60.0, -math.inf)])
def test_without_time_an_operation_is_tried_once(retry_timeout_s: float, deadline: float) -> None:
    flaky = Flaky(*[exceptions.ConnectionError("refused")] * 3)
    redis = RedisConnection.open(
        "redis://host", retry_timeout_s=retry_timeout_s, on_wait=pytest.fail
    )
    redis.deadline = deadline

    with pytest.raises(QueueUnavailable):
        redis.call(flaky)

    assert len(flaky.errors) == 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (exceptions.AuthenticationError("x"), "refused the password"),
        (exceptions.NoPermissionError("x"), "redis://host does not permit this command"),
    ],
)
def test_permanent_error_is_not_retried(error: Exception, message: str) -> None:
    redis = RedisConnection.open("redis://host", retry_timeout_s=60, on_wait=pytest.fail)

    with pytest.raises(QueueUnavailable, match=message):
        redis.call(Flaky(error))


def test_other_exceptions_propagate() -> None:
    with pytest.raises(KeyError):
        RedisConnection.open("redis://host", retry_timeout_s=60).call(Flaky(KeyError("bug")))
