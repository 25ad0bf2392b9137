"""`embedq-worker`: start a node, show its settings; the group of all commands."""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import click

from embedq.errors import EmbedqError
from embedq_worker import exits
from embedq_worker.check_cli import check, devices, health
from embedq_worker.choices import LogLevel
from embedq_worker.command import EPILOG, export, fail, load, model_options
from embedq_worker.model_cli import quantize, trace_binding, tune, warm
from embedq_worker.operator_cli import degrade, pause, recover, resume
from embedq_worker.settings import WorkerSettings

#: What the extra `cpu` brings and every node imports.
_OF_CPU_EXTRA = ("onnx", "onnxruntime", "tokenizers", "huggingface_hub")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
    help="Serve a sentence-embedding model from a queue, one node per device.",
)
def cli() -> None:
    """Group of all commands."""


for _command in (
    *(check, devices, health),
    *(quantize, trace_binding, tune, warm),
    *(degrade, pause, recover, resume),
):
    cli.add_command(_command)


@cli.command(epilog=EPILOG)
@model_options
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

    export(options)
    try:
        if part:
            starting.take_part(part)
        code = starting.start(WorkerSettings.load(), attempt=attempt, npu_off=npu_off)
    except EmbedqError as error:
        fail(error)
    sys.exit(code)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def settings(as_json: bool) -> None:
    """Show every setting, its value and where it comes from."""
    shown = list(load({}).describe())
    if as_json:
        click.echo(json.dumps([setting._asdict() for setting in shown]))
        return
    width = max(len(setting.name) for setting in shown)
    for setting in shown:
        click.echo(f"{setting.name:<{width}}  {setting.value}  ({setting.source})")


def run(arguments: list[str]) -> NoReturn:
    """Run one command in this process."""
    if os.name == "nt":
        click.echo("embedq-worker: Windows is not supported; use Linux or WSL 2.", err=True)
        sys.exit(exits.SETTINGS)
    try:
        cli(arguments, prog_name="embedq-worker")
    except ModuleNotFoundError as error:
        if error.name not in _OF_CPU_EXTRA:
            raise
        click.echo(
            f"embedq-worker: This needs {error.name}, which this Python does not have. "
            "Install it: pip install 'embedq[cpu]'.",
            err=True,
        )
        sys.exit(exits.SETTINGS)
    sys.exit(exits.OK)
