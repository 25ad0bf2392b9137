"""One way to open Redis: bounded waits, no surprises, errors without passwords."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from redis import Redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from embedq.errors import SettingsError
from embedq.settings import mask_password

#: Seconds to wait for a connection, and for an answer on it.
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 5.0, 30.0


def open_redis(
    url: str, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, timeout_s: float = ANSWER_TIMEOUT_S
) -> Redis:
    """Prepare a client for a Redis URL; nothing is sent yet.

    Raises:
        SettingsError: the URL is not one of Redis.
    """
    url = _as_redis_url(url)
    options: dict[str, Any] = {
        "socket_connect_timeout": connect_timeout_s,
        "socket_timeout": timeout_s,
        "health_check_interval": 10,
        "client_name": "embedq",
        "protocol": 2,  # answers keep one shape whatever the server's version
        # One silent second try for a connection that died idle; longer waits are embedq.patience's.
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


class _Client(Redis):
    """A client that Ctrl-C leaves as it was.

    redis-py puts a connection back whose answer is still to come, and from then on each command
    gets the answer of the one before it (measured with redis-py 8.1).
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
    """Turn kombu's URL of a unix socket into redis-py's; others are the same for both."""
    if not url.startswith("redis+socket://"):
        return url
    path, _, query = url.removeprefix("redis+socket://").partition("?")
    return f"unix://{path}?{query.replace('virtual_host=', 'db=')}"
