"""`embedq-worker`: start a node, check it, show its settings."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import click

from embedq.errors import EmbedqError, SettingsError
from embedq_worker import exits, logs
from embedq_worker.choices import DeviceChoice, LogLevel
from embedq_worker.errors import DeviceError, EngineError, ModelError, NpuUnproven
from embedq_worker.operator_cli import degrade, pause, recover, resume
from embedq_worker.settings import WorkerSettings

_CODES: dict[type[EmbedqError], int] = {
    SettingsError: exits.SETTINGS,
    ModelError: exits.MODEL,
    NpuUnproven: exits.NPU_UNPROVEN,
    DeviceError: exits.DEVICE,
    EngineError: exits.ENGINE,
}
_COLOURS = {"ok": "green", "warn": "yellow", "red": "red"}
_EPILOG = f"""\
{exits.EPILOG}
\b
Examples:
  embedq-worker check
  EMBEDQ_BROKER_URL=redis://queue:6379/0 embedq-worker start --device cpu
  embedq-worker start --all
  embedq-worker degrade npu0 --reason "a new driver"
  celery --app embedq_worker.app worker --concurrency 1
"""


def _model_options(command: click.decorators.FC) -> click.decorators.FC:
    for option in (
        click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]"),
        click.option(
            "--device",
            metavar="|".join(DeviceChoice),
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


for _command in (degrade, recover, pause, resume):
    cli.add_command(_command)


@cli.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("arguments", nargs=-1)
def health(arguments: tuple[str, ...]) -> None:
    """Say whether the nodes of this machine live; containers ask this."""
    from embedq_worker.health_check import main

    sys.exit(main(list(arguments)))


@cli.command(epilog=_EPILOG)
@_model_options
@click.option("--name", help="Name of the node, unique in the fleet.  [EMBEDQ_NAME]")
@click.option("--threads", type=int, help="Cores for the engine, 0 for all.  [EMBEDQ_THREADS]")
@click.option(
    "--log-level",
    metavar="|".join(LogLevel),
    help="How much to say.  [EMBEDQ_LOG_LEVEL]",
)
@click.option("--strict", is_flag=True, default=None, help="NPU or nothing.  [EMBEDQ_STRICT]")
@click.option("--all", "_all", is_flag=True, help="One node on the NPU and one on the CPU.")
@click.option("--part", hidden=True)
@click.option("--attempt", type=int, default=0, hidden=True)
@click.option("--npu-off", is_flag=True, hidden=True)
def start(
    _all: bool, part: str | None, attempt: int, npu_off: bool, **options: str | int | bool | None
) -> None:
    """Start a node and keep it running: load the model, prove it, then take batches."""
    from embedq_worker import starting

    _export(options)
    try:
        if part:
            starting.take_part(part)
        code = starting.start(WorkerSettings.load(), attempt=attempt, npu_off=npu_off)
    except EmbedqError as error:
        _fail(error)
    sys.exit(code)


@cli.command(epilog=_EPILOG)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def devices(as_json: bool) -> None:
    """Show the NPUs of this machine, who holds them, and what `start` would compute on."""
    settings = _load({})
    from embedq_worker import checks_device

    shown = checks_device.survey(settings)
    if as_json:
        click.echo(json.dumps(shown.as_dict()))
        return
    for line in shown.lines():
        click.echo(line)


@cli.command(epilog=_EPILOG)
@_model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def warm(as_json: bool, **options: str | None) -> None:
    """Compile the model for the device and prove it, so that the next start finds it done."""
    settings = _load(options)
    logs.send_native_to_stderr()
    from embedq_worker import lifecycle
    from embedq_worker.placement import place

    began = time.monotonic()
    try:
        placement = place(settings)
        claim = lifecycle.claim_device(settings, placement)
        opened = lifecycle.open_placed(settings, placement)
    except EmbedqError as error:
        _fail(error)
    engine = opened.engine
    shown = {
        "model": opened.card.label,
        "engine": engine.name,
        "device": str(engine.device),
        "precision": str(engine.precision),
        "seconds": round(time.monotonic() - began, 2),
    }
    opened.close()
    if claim is not None:
        claim.release()
    if as_json:
        click.echo(json.dumps(shown))
        return
    click.echo("{model} is ready: {engine} on {device}, {precision} ({seconds} s)".format(**shown))


@cli.command(epilog=_EPILOG)
@_model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def check(as_json: bool, **options: str | None) -> None:
    """Check Redis, model, engine and self-test, one line each."""
    settings = _load(options)
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


@cli.command("trace-binding", epilog=_EPILOG)
@_model_options
@click.option("--inferences", type=click.IntRange(1, 1_000_000), default=100, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def trace_binding(inferences: int, as_json: bool, **options: str | None) -> None:
    """Count how often the NPU's tensors moved and its command lists changed; best is never."""
    settings = _load(options)
    from embedq_worker import binding_trace, lifecycle
    from embedq_worker.placement import place

    try:
        placement = place(settings)
        claim = lifecycle.claim_device(settings, placement)
        found = binding_trace.trace(settings, placement.device, inferences)
    except EmbedqError as error:
        _fail(error)
    if claim is not None:
        claim.release()
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
    sys.exit(exits.OK if found.is_pinned else exits.CHECK)


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


def _export(options: Mapping[str, str | int | bool | None]) -> None:
    """Put options into the environment, where the app and the child read them."""
    for name, value in options.items():
        if value is not None:
            os.environ[f"EMBEDQ_{name.upper()}"] = str(value)


def _load(options: Mapping[str, str | int | bool | None]) -> WorkerSettings:
    _export(options)
    try:
        return WorkerSettings.load()
    except SettingsError as error:
        _fail(error)


def _fail(error: EmbedqError) -> NoReturn:
    click.echo(f"embedq-worker: {error}", err=True)
    sys.exit(next((code for kind, code in _CODES.items() if isinstance(error, kind)), 1))


def run(arguments: list[str]) -> NoReturn:
    """Run one command in this process."""
    if os.name == "nt":
        click.echo("embedq-worker: Windows is not supported; use Linux or WSL 2.", err=True)
        sys.exit(exits.SETTINGS)
    cli(arguments, prog_name="embedq-worker")
    sys.exit(exits.OK)
