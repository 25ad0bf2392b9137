"""Waiting for Redis: what for, how long, and what a person hears of it."""

from __future__ import annotations

import time

import pytest
from redis import exceptions

from embedq.errors import QueueUnavailable
from embedq.store.connection import call_with_retry, retryable_reason


class Flaky:
    """Fails a number of times, then answers."""

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
            "Redis takes no writes (a replica, failing over, or its disk)",
        ),
        (exceptions.ResponseError("MISCONF Errors writing"), "Redis cannot write to its disk"),
        (exceptions.AuthenticationError("password"), None),
        (exceptions.NoPermissionError("user"), None),
        (exceptions.ResponseError("WRONGTYPE"), None),
    ],
)
def test_only_what_may_pass_is_waited_for(error: Exception, reason: str | None) -> None:
    """A lost, loading, full or read-only Redis may come back; a wrong password will not."""
    assert retryable_reason(error) == reason


def test_action_is_repeated_until_it_answers() -> None:
    """Two failures are two waits and one report."""
    told: list[str] = []
    flaky = Flaky(exceptions.ConnectionError("a"), exceptions.OutOfMemoryError("b"))

    answer = call_with_retry(flaky, retry_timeout_s=10, on_wait=told.append, where="redis://host")

    assert answer == "answer"
    assert told == ["Redis cannot be reached at redis://host; waiting (0 s so far)."]


def test_patience_ends_with_the_next_step() -> None:
    """After its patience the error names the place, the reason and what to do."""
    errors = [exceptions.ConnectionError("refused")] * 50
    began = time.monotonic()

    with pytest.raises(QueueUnavailable, match=r"at redis://host.*Start Redis, or set EMBEDQ_BR"):
        call_with_retry(
            Flaky(*errors), retry_timeout_s=0.5, on_wait=lambda _: None, where="redis://host"
        )

    assert time.monotonic() - began < 2


def test_without_patience_an_action_is_tried_once() -> None:
    """Patience 0 is one try and no wait."""
    flaky = Flaky(*[exceptions.ConnectionError("refused")] * 3)

    with pytest.raises(QueueUnavailable):
        call_with_retry(flaky, retry_timeout_s=0, on_wait=pytest.fail, where="")

    assert len(flaky.errors) == 2


def test_what_cannot_pass_is_not_waited_for() -> None:
    """A refused password ends at once, and says so."""
    with pytest.raises(QueueUnavailable, match="refused the password"):
        call_with_retry(
            Flaky(exceptions.AuthenticationError("x")),
            retry_timeout_s=60,
            on_wait=lambda _: None,
            where="",
        )


def test_other_errors_pass_through() -> None:
    """An error that is not of Redis is not ours to wait for."""
    with pytest.raises(KeyError):
        call_with_retry(
            Flaky(KeyError("bug")), retry_timeout_s=60, on_wait=lambda _: None, where=""
        )


def test_user_who_may_not_is_told_who_may() -> None:
    """Each user of Redis can do its own work only, so the way out is another user's URLs."""
    with pytest.raises(QueueUnavailable, match="redis://host does not allow this to its user"):
        call_with_retry(
            Flaky(exceptions.NoPermissionError("no permissions")),
            retry_timeout_s=60,
            on_wait=lambda _: None,
            where="redis://host",
        )
