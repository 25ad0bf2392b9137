"""Commands for operators: devices, check, health, degrade, recover, pause, resume."""

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

_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}
#: Maximum length of an operator's reason, characters.
MAX_REASON = 200


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def devices(as_json: bool) -> None:
    """List NPUs, their holders and the device of `start`."""
    settings = load({})
    from embedq_worker.cli import check_npu

    shown = check_npu.survey(settings)
    if as_json:
        click.echo(json.dumps(shown._asdict()))
        return
    for line in shown.lines():
        click.echo(line)


@click.command(epilog=EPILOG)
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def check(as_json: bool, **options: str | None) -> None:
    """Check Redis, folders, NPU, model and engine."""
    settings = load(options)
    process.send_native_to_stderr()
    from embedq_worker.cli import check as check_module

    done = []
    for result in check_module.run(settings):
        done.append(result)
        if not as_json:
            mark = click.style(f"{result.level:<4}", fg=_COLORS[result.level])
            click.echo(f"{result.name:<10} {mark}  {result.detail}  ({result.seconds:.2f} s)")
            if result.fix:
                click.echo(f"{'':<10}       {result.fix}")
    ok = all(result.level != "fail" for result in done)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": [result._asdict() for result in done]}))
    sys.exit(exit_codes.OK if ok else exit_codes.CHECK)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1)
def health(arguments: tuple[str, ...]) -> None:
    """Check that the workers of this machine are alive."""
    from embedq_worker.main_process.liveness import main

    sys.exit(main(list(arguments)))


_REASON = click.option("--reason", default="", help="Reason, shown by `embedq status`.")


@click.command(epilog=exit_codes.EPILOG)
@click.argument("worker")
@_REASON
def degrade(worker: str, reason: str) -> None:
    """Move WORKER from its NPU to its CPU until `recover`.

    A worker without an NPU stops consuming.
    """
    from embedq.store.fleet import DesiredState, set_desired_state

    reason = _bounded(reason or "An operator degraded the worker.")
    with _results() as redis:
        _require(redis, worker)
        set_desired_state(redis, worker, DesiredState.DEGRADED, reason)
    click.echo(f"{worker} is degraded until: embedq-worker recover {worker}")


@click.command(epilog=exit_codes.EPILOG)
@click.argument("worker")
def recover(worker: str) -> None:
    """Undo `degrade`, or probe a degraded NPU now.

    WORKER does not wait for its next probe, and uses its NPU again if the probe passes.
    """
    from embedq.store.fleet import DesiredState, set_desired_state

    with _results() as redis:
        _require(redis, worker)
        set_desired_state(redis, worker, DesiredState.HEALTHY, "")
    click.echo(f"{worker} probes its NPU now, and uses it if the probe passes.")


@click.command(epilog=exit_codes.EPILOG)
@_REASON
def pause(reason: str) -> None:
    """Pause the fleet: workers finish their batch and stop consuming."""
    from embedq.store.fleet import pause as pause_fleet

    with _results() as redis:
        pause_fleet(redis, _bounded(reason or "An operator paused the fleet."))
    click.echo("The fleet is paused until: embedq-worker resume")


@click.command(epilog=exit_codes.EPILOG)
def resume() -> None:
    """Resume the fleet after `pause`."""
    from embedq.store.fleet import resume as resume_fleet

    with _results() as redis:
        was_paused = resume_fleet(redis)
    click.echo("The fleet is resumed." if was_paused else "The fleet was not paused.")


@contextmanager
def _results() -> Iterator[Redis]:
    from redis.exceptions import NoPermissionError, RedisError

    from embedq.settings import mask_password
    from embedq.store.connection import open_redis

    url = load({}).results_url
    where = mask_password(url)
    try:
        with open_redis(url) as redis:
            try:
                yield redis
            except NoPermissionError as error:
                raise QueueUnavailable(
                    f"The Redis user of {where} may not write operator commands. Set "
                    "EMBEDQ_RESULTS_URL to the URL of the user ops (docs/operations.md)."
                ) from error
            except RedisError as error:
                raise QueueUnavailable(
                    f"Redis at {where} did not store the command ({type(error).__name__}). Start "
                    "that Redis, or set EMBEDQ_RESULTS_URL to the results Redis of the fleet."
                ) from error
    except EmbedqError as error:
        fail(error)


def _require(redis: Redis, worker: str) -> None:
    # A worker that is down now is known for a day, and reads the command when it starts.
    from embedq.store.fleet import list_workers

    known = list_workers(redis)
    if worker not in known:
        shown = ", ".join(known) or "none"
        raise SettingsError(
            f"No worker {worker} was seen in the last day.{did_you_mean(worker, known)} Seen "
            f"were: {shown}."
        )


def _bounded(reason: str) -> str:
    plain = " ".join(reason.split())
    if len(plain) > MAX_REASON:
        message = f"--reason has {len(plain)} characters; the limit is {MAX_REASON}. Shorten it."
        fail(SettingsError(message))
    return plain
