"""`embedq-worker degrade | recover | pause | resume`: what an operator may want of a fleet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from embedq.errors import EmbedqError, QueueUnavailable, SettingsError
from embedq.hints import nearest
from embedq_worker import exits

if TYPE_CHECKING:
    from redis import Redis

#: Longest reason that an operator may give, in characters.
MAX_REASON = 200
_REASON = click.option(
    "--reason",
    default="",
    help="Why, in your words; shown wherever the node is.",
)


@click.command(epilog=exits.EPILOG)
@click.argument("node")
@_REASON
def degrade(node: str, reason: str) -> None:
    """Keep NODE off its NPU until `recover`; one without an NPU takes nothing more."""
    from embedq.orders import Wanted, give

    reason = _bounded(reason or "An operator took it out of service.")
    with _results() as redis:
        _require(redis, node)
        give(redis, node, Wanted.DEGRADED, reason)
    click.echo(f"{node} is kept off its NPU until: embedq-worker recover {node}")


@click.command(epilog=exits.EPILOG)
@click.argument("node")
def recover(node: str) -> None:
    """Undo `degrade`, or have a degraded NODE try its NPU now instead of at its next probe."""
    from embedq.orders import Wanted, give

    with _results() as redis:
        _require(redis, node)
        give(redis, node, Wanted.HEALTHY, "")
    click.echo(f"{node} tries its NPU now, and serves with it if it proves itself.")


@click.command(epilog=exits.EPILOG)
@_REASON
def pause(reason: str) -> None:
    """Let every node finish the batch it holds and take nothing more, until `resume`."""
    from embedq.orders import pause as pause_fleet

    with _results() as redis:
        pause_fleet(redis, _bounded(reason or "An operator paused the fleet."))
    click.echo("The fleet is paused until: embedq-worker resume")


@click.command(epilog=exits.EPILOG)
def resume() -> None:
    """End the pause of the fleet."""
    from embedq.orders import resume as resume_fleet

    with _results() as redis:
        was_paused = resume_fleet(redis)
    click.echo("The fleet works again." if was_paused else "The fleet was not paused.")


@contextmanager
def _results() -> Iterator[Redis]:
    """Open the results Redis of the settings; end the command with a sentence if it fails."""
    from redis.exceptions import NoPermissionError, RedisError

    from embedq.redis_client import open_redis
    from embedq.settings import mask_password
    from embedq_worker.settings import WorkerSettings

    try:
        settings = WorkerSettings.load()
        with open_redis(settings.results_url) as redis:
            try:
                yield redis
            except NoPermissionError as error:
                where = mask_password(settings.results_url)
                raise QueueUnavailable(
                    f"Redis at {where} does not take orders from its user. Set EMBEDQ_RESULTS_URL "
                    "to the one of the user ops (ops/README.md)."
                ) from error
            except RedisError as error:
                where = mask_password(settings.results_url)
                raise QueueUnavailable(
                    f"Redis at {where} did not take the order ({type(error).__name__}). Set "
                    "EMBEDQ_RESULTS_URL to the fleet's, or try again when it is there."
                ) from error
    except EmbedqError as error:
        click.echo(f"embedq-worker: {error}", err=True)
        sys.exit(exits.SETTINGS if isinstance(error, SettingsError) else exits.FAILURE)


def _require(redis: Redis, node: str) -> None:
    """Refuse a node that nobody has heard of; one that is down now may have orders."""
    from embedq.fleet import fetch_known

    known = fetch_known(redis)
    if node not in known:
        shown = ", ".join(known) or "none"
        raise SettingsError(
            f"No node {node} was seen in the last day.{nearest(node, known)} Seen: {shown}."
        )


def _bounded(reason: str) -> str:
    plain = " ".join(reason.split())
    if len(plain) > MAX_REASON:
        click.echo(
            f"embedq-worker: --reason has {len(plain)} characters; the limit is {MAX_REASON}. "
            "Shorten it.",
            err=True,
        )
        sys.exit(exits.SETTINGS)
    return plain
