"""Opens Redis and retries failed operations with backoff.

Every connection has timeouts, and no error message contains a password.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from redis import Redis, exceptions
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from embedq.errors import QueueUnavailable, SettingsError
from embedq.settings import mask_password

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Callback for a message about a wait.
OnWait = Callable[[str], None]


def log_retry(message: str) -> None:
    """Log a wait for Redis as a warning."""
    log.warning("redis_retry reason=%s", message)


#: Initial and maximum delay between two attempts, seconds.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0

#: Interval between two messages about the same wait, seconds.
REPORT_EVERY_S = 10.0

#: Next step when Redis cannot be reached, for error messages.
REDIS_HINT = (
    "Start Redis, or set EMBEDQ_BROKER_URL and EMBEDQ_RESULTS_URL; "
    "`embedq embed --local` needs neither"
)


def retryable_reason(error: Exception) -> str | None:
    """Return why an operation may succeed later, or None for a permanent error."""
    if isinstance(error, exceptions.AuthenticationError):
        return None
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError):
        return "Redis cannot be reached"
    if isinstance(error, exceptions.ReadOnlyError):
        return "Redis refuses writes (a replica, a failover or a full disk)"
    # In a pipeline, redis-py reports a full Redis as a plain ResponseError.
    message = str(error) if isinstance(error, exceptions.ResponseError) else ""
    if isinstance(error, exceptions.OutOfMemoryError) or "maxmemory" in message:
        return "Redis is full (maxmemory)"
    if message.startswith("MISCONF"):  # redis-py has no class for this error
        return "Redis cannot write to its disk"
    return None


#: Timeouts of a new connection and of one response, seconds.
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 30.0


def open_redis(
    url: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, timeout_s: float = ANSWER_TIMEOUT_S
) -> Redis:
    """Prepare a client for a Redis URL; nothing is sent yet.

    Raises:
        SettingsError: the URL is not a Redis URL.
    """
    url = _as_redis_url(url)
    options: dict[str, Any] = {
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": timeout_s,
        "health_check_interval": 10,
        "client_name": "embedq",
        "protocol": 2,  # the same response types from every server version
        # One retry, for a connection that was closed while idle.
        "retry": Retry(NoBackoff(), 1),
    }
    if url.startswith("unix://"):
        del options["socket_connect_timeout"]
    try:
        return _Client.from_url(url, **options)
    except ValueError as error:
        raise SettingsError(
            f"{mask_password(url)} is not a Redis URL ({error}). "
            "Use redis://host:port/db, rediss://host:port/db or "
            "redis+socket:///path?virtual_host=db."
        ) from None


@dataclass(slots=True)
class RedisConnection:
    """A Redis client that retries failed operations.

    Attributes:
        client: the client itself, which does not retry.
        address: URL without password, for messages.
        retry_timeout_s: time to retry one operation, seconds; 0 tries once.
        deadline: time.monotonic() after which nothing is retried.
        on_wait: receives a message when a wait begins and every REPORT_EVERY_S after that.
        advice: next step, appended to that message.
    """

    client: Redis
    address: str
    retry_timeout_s: float = 0.0
    deadline: float = math.inf
    on_wait: OnWait = log_retry
    advice: str = ""

    @classmethod
    def open(
        cls,
        url: str,
        *,
        retry_timeout_s: float = 0.0,
        on_wait: OnWait = log_retry,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        timeout_s: float = ANSWER_TIMEOUT_S,
    ) -> Self:
        """Prepare a connection to a Redis URL; nothing is sent yet.

        Raises:
            SettingsError: the URL is not a Redis URL.
        """
        client = open_redis(url, connect_timeout_s=connect_timeout_s, timeout_s=timeout_s)
        return cls(client, mask_password(url), retry_timeout_s, on_wait=on_wait)

    def call(self, action: Callable[[], T]) -> T:
        """Run a Redis operation, retrying for `retry_timeout_s` or until `deadline`.

        Args:
            action: must be safe to repeat.

        Raises:
            QueueUnavailable: the time is over, or the error is permanent.
        """
        began = time.monotonic()
        timeout_s = min(self.retry_timeout_s, max(0.0, self.deadline - began))
        pause, reported = FIRST_PAUSE_S, -REPORT_EVERY_S
        while True:
            try:
                return action()
            except exceptions.RedisError as error:
                reason = retryable_reason(error)
                waited = time.monotonic() - began
                if reason is None or waited + pause > timeout_s:
                    raise QueueUnavailable(
                        _sentence(error, reason, self.address, waited)
                    ) from error
            if waited - reported >= REPORT_EVERY_S:
                self.on_wait(
                    f"{reason} at {self.address}; waiting ({waited:.0f} s so far).{self.advice}"
                )
                reported = waited
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _sentence(error: Exception, reason: str | None, where: str, waited: float) -> str:
    if isinstance(error, exceptions.AuthenticationError):
        return f"Redis at {where} refused the password or user. Check the URL."
    if isinstance(error, exceptions.NoPermissionError):
        return (
            f"Redis at {where} does not permit this command for its user. Use the URLs of the "
            "user producer to embed, of the user ops to operate the fleet (docs/operations.md)."
        )
    if reason is None:
        return f"Redis at {where} refused a command ({type(error).__name__})."
    after = f" after {waited:.0f} s" if waited >= 1 else ""
    return f"{reason} at {where}{after}. {REDIS_HINT}."


class _Client(Redis):
    """A client that closes its connections when a command is interrupted, as by Ctrl-C.

    redis-py would reuse the connection, and each later command would read the response to the
    command before it.
    """

    def execute_command(self, *args: Any, **options: Any) -> Any:
        with _closing_if_interrupted(self):
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call] # untyped in redis-py

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Pipeline:
        return _Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)


class _Pipeline(Pipeline):
    def execute(self, raise_on_error: bool = True) -> list[Any]:
        with _closing_if_interrupted(self):
            return super().execute(raise_on_error)


@contextmanager
def _closing_if_interrupted(client: Redis) -> Iterator[None]:
    try:
        yield
    except Exception:
        raise
    except BaseException:
        client.connection_pool.disconnect()
        raise


def _as_redis_url(url: str) -> str:
    # Kombu and redis-py differ only in the URL of a unix socket.
    if not url.startswith("redis+socket://"):
        return url
    path, _, query = url.removeprefix("redis+socket://").partition("?")
    return f"unix://{path}?{query.replace('virtual_host=', 'db=')}"
