"""Commands for operators: degrade, recover, pause, resume, check, health.

`embedq-worker devices | check | health`: how this machine and its workers are.

`embedq-worker degrade | recover | pause | resume`: what an operator may want of a fleet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from embedq.errors import EmbedqError, QueueUnavailable, SettingsError, did_you_mean
from embedq_worker import exit_codes, process
from embedq_worker.cli.common import EPILOG, fail, load, model_options

if TYPE_CHECKING:
    from redis import Redis

_COLORS = {"ok": "green", "warn": "yellow", "red": "red"}


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def devices(as_json: bool) -> None:
    """Show the NPUs of this machine, who holds them, and what `start` would compute on."""
    settings = load({})
    from embedq_worker.cli import check_npu

    shown = check_npu.survey(settings)
    if as_json:
        click.echo(json.dumps(shown.as_dict()))
        return
    for line in shown.lines():
        click.echo(line)


@click.command(epilog=EPILOG)
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def check(as_json: bool, **options: str | None) -> None:
    """Check Redis, model, engine and self-test, one line each."""
    settings = load(options)
    process.send_native_to_stderr()
    from embedq_worker.cli import (
        check as check_module,  # Celery and the engine, not needed for --help
    )

    done = []
    for result in check_module.run(settings):
        done.append(result)
        if not as_json:
            mark = click.style(f"{result.level:<4}", fg=_COLORS[result.level])
            click.echo(f"{result.name:<10} {mark}  {result.detail}  ({result.seconds:.2f} s)")
            if result.fix:
                click.echo(f"{'':<10}       {result.fix}")
    ok = all(result.level != "red" for result in done)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": [result.as_dict() for result in done]}))
    sys.exit(exit_codes.OK if ok else exit_codes.CHECK)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1)
def health(arguments: tuple[str, ...]) -> None:
    """Say whether the workers of this machine live; containers ask this."""
    from embedq_worker.main_process.liveness import main

    sys.exit(main(list(arguments)))


#: Longest reason that an operator may give, in characters.
MAX_REASON = 200


_REASON = click.option(
    "--reason",
    default="",
    help="Why, in your words; shown wherever the worker is.",
)


@click.command(epilog=exit_codes.EPILOG)
@click.argument("worker")
@_REASON
def degrade(worker: str, reason: str) -> None:
    """Keep WORKER off its NPU until `recover`; one without an NPU takes nothing more."""
    from embedq.store.fleet import DesiredState, set_desired_state

    reason = _bounded(reason or "An operator took it out of service.")
    with _results() as redis:
        _require(redis, worker)
        set_desired_state(redis, worker, DesiredState.DEGRADED, reason)
    click.echo(f"{worker} is kept off its NPU until: embedq-worker recover {worker}")


@click.command(epilog=exit_codes.EPILOG)
@click.argument("worker")
def recover(worker: str) -> None:
    """Undo `degrade`, or have a degraded WORKER try its NPU now instead of at its next probe."""
    from embedq.store.fleet import DesiredState, set_desired_state

    with _results() as redis:
        _require(redis, worker)
        set_desired_state(redis, worker, DesiredState.HEALTHY, "")
    click.echo(f"{worker} tries its NPU now, and serves with it if it proves itself.")


@click.command(epilog=exit_codes.EPILOG)
@_REASON
def pause(reason: str) -> None:
    """Let every worker finish the batch it holds and take nothing more, until `resume`."""
    from embedq.store.fleet import pause as pause_fleet

    with _results() as redis:
        pause_fleet(redis, _bounded(reason or "An operator paused the fleet."))
    click.echo("The fleet is paused until: embedq-worker resume")


@click.command(epilog=exit_codes.EPILOG)
def resume() -> None:
    """End the pause of the fleet."""
    from embedq.store.fleet import resume as resume_fleet

    with _results() as redis:
        was_paused = resume_fleet(redis)
    click.echo("The fleet works again." if was_paused else "The fleet was not paused.")


@contextmanager
def _results() -> Iterator[Redis]:
    """Open the results Redis of the settings; end the command with a sentence if it fails."""
    from redis.exceptions import NoPermissionError, RedisError

    from embedq.settings import mask_password
    from embedq.store.connection import open_redis
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
                    "to the one of the user ops (docs/operations.md)."
                ) from error
            except RedisError as error:
                where = mask_password(settings.results_url)
                raise QueueUnavailable(
                    f"Redis at {where} did not take the order ({type(error).__name__}). Set "
                    "EMBEDQ_RESULTS_URL to the fleet's, or try again when it is there."
                ) from error
    except EmbedqError as error:
        fail(error)


def _require(redis: Redis, worker: str) -> None:
    """Refuse a worker that nobody has heard of; one that is down now may have orders."""
    from embedq.store.fleet import list_workers

    known = list_workers(redis)
    if worker not in known:
        shown = ", ".join(known) or "none"
        raise SettingsError(
            f"No worker {worker} was seen in the last day.{did_you_mean(worker, known)} Seen: "
            f"{shown}."
        )


def _bounded(reason: str) -> str:
    plain = " ".join(reason.split())
    if len(plain) > MAX_REASON:
        fail(
            SettingsError(
                f"--reason has {len(plain)} characters; the limit is {MAX_REASON}. Shorten it."
            )
        )
    return plain
