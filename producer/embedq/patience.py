"""Waiting for Redis: what is worth waiting for, how long, and what a person is told meanwhile."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from redis import exceptions

from embedq.errors import QueueUnavailable

T = TypeVar("T")
#: Told when a wait begins and at most every ten seconds while it lasts.
OnWait = Callable[[str], None]

#: First and longest pause between two tries, in seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
#: Seconds between two reports of the same wait.
REPORT_EVERY_S = 10.0

#: What helps when there is no Redis.
WAYS_OUT = "Start Redis, or set EMBEDQ_BROKER_URL and EMBEDQ_RESULTS_URL, or use --local"

_GONE = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.BusyLoadingError)


def waits_for(error: Exception) -> str | None:
    """Say what an error asks us to wait for, or None if waiting cannot help."""
    if isinstance(error, exceptions.AuthenticationError):
        return None
    if isinstance(error, exceptions.OutOfMemoryError):
        return "Redis is full (maxmemory)"
    if isinstance(error, exceptions.ReadOnlyError):
        return "Redis takes no writes (a replica, failing over, or its disk)"
    if isinstance(error, _GONE):
        return "Redis cannot be reached"
    # A full Redis refuses the commands of a pipeline one by one, with the reason in the text only.
    if isinstance(error, exceptions.ResponseError) and "maxmemory" in str(error):
        return "Redis is full (maxmemory)"
    # redis-py has no class for it.
    if isinstance(error, exceptions.ResponseError) and str(error).startswith("MISCONF"):
        return "Redis cannot write to its disk"
    return None


def patiently(
    action: Callable[[], T],
    *,
    patience_s: float,
    on_wait: OnWait,
    where: str,
    advice: str = "",
) -> T:
    """Run an action on Redis, and again while it is worth waiting.

    Args:
        action: must be safe to repeat.
        patience_s: seconds to keep trying; 0 tries once.
        on_wait: told what is waited for.
        where: address of this Redis for messages, without its password.
        advice: what a person may do while it waits, for the end of what they are told.

    Raises:
        QueueUnavailable: patience ran out, or waiting cannot help.
    """
    began = time.monotonic()
    pause, reported = FIRST_PAUSE_S, -REPORT_EVERY_S
    while True:
        try:
            return action()
        except exceptions.RedisError as error:
            reason = waits_for(error)
            waited = time.monotonic() - began
            if reason is None or waited + pause > patience_s:
                raise QueueUnavailable(_sentence(error, reason, where, waited)) from error
        if waited - reported >= REPORT_EVERY_S:
            on_wait(f"{reason} at {where}; waiting ({waited:.0f} s so far).{advice}")
            reported = waited
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _sentence(error: Exception, reason: str | None, where: str, waited: float) -> str:
    if isinstance(error, exceptions.AuthenticationError):
        return f"Redis at {where} refused the password or user. Check the URL."
    if isinstance(error, exceptions.NoPermissionError):
        return (
            f"Redis at {where} does not allow this to its user. Use the URLs of one who may: "
            "producer embeds, ops looks and gives orders (ops/README.md)."
        )
    if reason is None:
        return f"Redis at {where} refused a command ({type(error).__name__})."
    after = f" after {waited:.0f} s" if waited >= 1 else ""
    return f"{reason} at {where}{after}. {WAYS_OUT}."
