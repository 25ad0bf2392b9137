"""`embedq-worker`: start a node, check it, show its settings."""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import click

from embedq.errors import EmbedqError, SettingsError
from embedq_worker.errors import EngineError, ModelError
from embedq_worker.settings import DeviceChoice, LogLevel, WorkerSettings
from embedq_worker.state import StateFile

EXIT_OK, EXIT_SETTINGS, EXIT_MODEL, EXIT_ENGINE, EXIT_CHECK = 0, 2, 3, 4, 5

_COLOURS = {"ok": "green", "warn": "yellow", "red": "red"}
_EPILOG = """\b
Exit codes:
  0 done    2 wrong setting or option    3 model missing or damaged
  4 engine failed    5 a check is red
\b
Examples:
  embedq-worker check
  EMBEDQ_BROKER_URL=redis://queue:6379/0 embedq-worker start --device cpu
  celery --app embedq_worker.app worker --concurrency 1
"""


def _model_options(command: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]"),
        click.option(
            "--device",
            type=click.Choice([str(choice) for choice in DeviceChoice]),
            help="What to compute on.  [EMBEDQ_DEVICE]",
        ),
    ):
        command = option(command)
    return command


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
    help="Serve a sentence-embedding model from a queue, one node per device.",
)
def cli() -> None:
    """Group of all commands."""


@cli.command(epilog=_EPILOG)
@_model_options
@click.option("--name", help="Name of the node, unique in the fleet.  [EMBEDQ_NAME]")
@click.option("--threads", type=int, help="Cores for the engine, 0 for all.  [EMBEDQ_THREADS]")
@click.option(
    "--log-level",
    type=click.Choice([str(level) for level in LogLevel]),
    help="How much to say.  [EMBEDQ_LOG_LEVEL]",
)
def start(**options: str | int | None) -> None:
    """Start a node: load the model, prove it, then take batches from the queue."""
    settings = _load(options)
    # Looked up here as well as in the child, so that a wrong model ends the command with a sentence
    # instead of a node that never serves. The checksums are cached, so it costs once.
    from embedq_worker.lifecycle import find_model

    try:
        find_model(settings)
        StateFile(settings.runtime_dir, settings.name).remove()
    except EmbedqError as error:
        _fail(error)
    sys.exit(_run_node(settings))


@cli.command(epilog=_EPILOG)
@_model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def check(as_json: bool, **options: str | None) -> None:
    """Check Redis, model, engine and self-test, one line each."""
    settings = _load(options)
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
    sys.exit(EXIT_OK if ok else EXIT_CHECK)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def settings(as_json: bool) -> None:
    """Show every setting, its value and where it comes from."""
    shown = list(_load({}).describe())
    if as_json:
        click.echo(json.dumps([setting._asdict() for setting in shown]))
        return
    width = max(len(setting.name) for setting in shown)
    for setting in shown:
        click.echo(f"{setting.name:<{width}}  {setting.value}  ({setting.source})")


def _load(options: dict[str, str | int | None] | dict[str, str | None]) -> WorkerSettings:
    """Put options into the environment, where the app and the child read them, and load."""
    for name, value in options.items():
        if value is not None:
            os.environ[f"EMBEDQ_{name.upper()}"] = str(value)
    try:
        return WorkerSettings.load()
    except SettingsError as error:
        _fail(error)


def _run_node(settings: WorkerSettings) -> int:
    """Run the Celery worker that `celery --app embedq_worker.app worker ...` would run."""
    from embedq_worker import logs
    from embedq_worker.app import app

    logs.set_up(str(settings.log_level))
    arguments = ["--quiet", "worker", "--hostname", f"{settings.name}@%h"]
    # Gossip and mingle only add chatter on Redis; nodes here need not know each other.
    arguments += ["--without-gossip", "--without-mingle", "--loglevel", str(settings.log_level)]
    try:
        app.worker_main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else EXIT_ENGINE
    return EXIT_OK


def _fail(error: EmbedqError) -> NoReturn:
    click.echo(f"embedq-worker: {error}", err=True)
    codes = {SettingsError: EXIT_SETTINGS, ModelError: EXIT_MODEL, EngineError: EXIT_ENGINE}
    sys.exit(next((code for kind, code in codes.items() if isinstance(error, kind)), 1))


def main() -> None:
    """Run the command line."""
    if os.name == "nt":
        click.echo("embedq-worker: Windows is not supported; use Linux or WSL 2.", err=True)
        sys.exit(EXIT_SETTINGS)
    cli()
