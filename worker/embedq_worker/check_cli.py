"""`embedq-worker devices | check | health`: how this machine and its nodes are."""

from __future__ import annotations

import json
import sys

import click

from embedq_worker import exits, logs
from embedq_worker.command import EPILOG, load, model_options

_COLOURS = {"ok": "green", "warn": "yellow", "red": "red"}


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def devices(as_json: bool) -> None:
    """Show the NPUs of this machine, who holds them, and what `start` would compute on."""
    settings = load({})
    from embedq_worker import checks_device

    shown = checks_device.survey(settings)
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
    logs.send_native_to_stderr()
    from embedq_worker import checks  # Celery and the engine, not needed for --help

    done = []
    for result in checks.run(settings):
        done.append(result)
        if not as_json:
            mark = click.style(f"{result.level:<4}", fg=_COLOURS[result.level])
            click.echo(f"{result.name:<10} {mark}  {result.detail}  ({result.seconds:.2f} s)")
            if result.mend:
                click.echo(f"{'':<10}       {result.mend}")
    ok = all(result.level != "red" for result in done)
    if as_json:
        click.echo(json.dumps({"ok": ok, "checks": [result.as_dict() for result in done]}))
    sys.exit(exits.OK if ok else exits.CHECK)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1)
def health(arguments: tuple[str, ...]) -> None:
    """Say whether the nodes of this machine live; containers ask this."""
    from embedq_worker.health_check import main

    sys.exit(main(list(arguments)))
