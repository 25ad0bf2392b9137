"""Group of all `embedq-worker` commands, with start, warm, quantize and settings.

Commands import runtimes inside their functions, so that `--help` stays fast.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import NoReturn

import click

from embedq.cli.common import exit_code, exit_on_windows, print_settings
from embedq.errors import EmbedqError
from embedq_worker import exit_codes, process
from embedq_worker.cli.common import EPILOG, EXIT_CODES, export, fail, load, model_options
from embedq_worker.cli.models import models
from embedq_worker.cli.operations import check, degrade, devices, health, pause, recover, resume
from embedq_worker.errors import FailureReason, describe
from embedq_worker.settings import LogLevel, WorkerSettings


@click.command(epilog=EPILOG)
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
@click.option("--probe", type=int, default=0, hidden=True, metavar="PID")
def warm(as_json: bool, probe: int, **options: str | None) -> None:
    """Compile and self-test the model, so that the next start is fast."""
    settings = load(options)
    process.send_native_to_stderr()
    from embedq_worker.inference import opener

    if probe:  # started by the main process of a degraded worker
        process.set_up(str(settings.log_level))
        process.die_with_parent()
        if os.getppid() != probe:  # the main process died before the line above
            sys.exit(exit_codes.FAILURE)
    began = time.monotonic()
    code = exit_codes.OK
    try:
        engines, _ = opener.open_once(settings, npu_only=bool(probe))
        engine = engines.standard.engine
        shown = {
            "model": engines.model_info.label,
            "engine": engine.name,
            "device": str(engine.device),
            "precision": str(engine.precision),
            "seconds": round(time.monotonic() - began, 2),
        }
    except Exception as error:
        if not as_json:
            if isinstance(error, EmbedqError):
                fail(error)
            raise
        word, reason = describe(error, FailureReason.INIT_FAILED)
        shown, code = {"code": word, "reason": reason}, exit_code(error, EXIT_CODES)
    if as_json:
        click.echo(json.dumps(shown))
    else:
        line = "{model} is ready: {engine} on {device}, {precision} ({seconds} s)"
        click.echo(line.format(**shown))
    if probe:
        os._exit(code)  # the clean-up of a runtime whose device is gone may hang
    sys.exit(code)


@click.command(epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="FILE...")
@click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]")
@click.option("--text-field", default="text", show_default=True, help="Field that holds the text.")
@click.option("--format", "format_", help="txt, jsonl or csv; default: by file extension.")
@click.option(
    "--texts",
    type=click.IntRange(10, 10_000),
    default=300,
    show_default=True,
    help="Maximum number of calibration texts; up to 1,000 others are held out for the report.",
)
@click.option(
    "--min-overlap",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Smallest share of unchanged top-10 neighbors with which the model is stored.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def quantize(
    inputs: tuple[str, ...],
    model: str | None,
    text_field: str,
    format_: str | None,
    texts: int,
    min_overlap: float,
    as_json: bool,
) -> None:
    """Quantize the model to int8 and compare it with fp32.

    FILE holds texts like those that will be embedded: txt, jsonl, csv, or .gz of one.
    Jobs of accuracy class int8 use the stored model after the next start of the worker.
    """
    settings = load({"model": model})
    process.send_native_to_stderr()
    from embedq_worker.cli import quantize as quantize_module

    try:
        quantize_module.require_nncf()
        options = quantize_module.QuantizeOptions(inputs, text_field, format_, texts, min_overlap)
        found = quantize_module.run(settings, options, lambda line: click.echo(line, err=True))
    except EmbedqError as error:
        fail(error)
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
    sys.exit(exit_codes.OK if found.stored else exit_codes.CHECK)


#: Packages of the extra `cpu`, which every worker imports.
_OF_CPU_EXTRA = ("onnx", "onnxruntime", "tokenizers", "huggingface_hub")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
    help="Compute embeddings for batches of a queue, one worker per device.",
)
def cli() -> None:
    """Group of all commands."""


for _command in (check, devices, health, models, quantize, warm, degrade, pause, recover, resume):
    cli.add_command(_command)


@cli.command(epilog=EPILOG)
@model_options
@click.option("--name", help="Name of the worker, unique in the fleet.  [EMBEDQ_NAME]")
@click.option("--threads", type=int, help="Cores of the engine; 0 = all.  [EMBEDQ_THREADS]")
@click.option(
    "--log-level", metavar="|".join(LogLevel), help="Lowest level of log lines.  [EMBEDQ_LOG_LEVEL]"
)
@click.option("--strict", is_flag=True, default=None, help="Use the NPU only.  [EMBEDQ_STRICT]")
@click.option("--all", "_all", is_flag=True, help="Start one worker on the NPU and one on the CPU.")
@click.option("--part", hidden=True)
@click.option("--attempt", type=int, default=0, hidden=True)
@click.option("--npu-off", is_flag=True, hidden=True)
def start(
    _all: bool, part: str | None, attempt: int, npu_off: bool, **options: str | int | bool | None
) -> None:
    """Start a worker and restart it after a crash.

    The worker loads the model, runs the self-test and consumes batches until it is stopped.
    """
    from embedq_worker.main_process import start as start_module

    export(options)
    try:
        if part:
            start_module.configure_part(part)
        code = start_module.start(WorkerSettings.load(), attempt=attempt, npu_off=npu_off)
    except EmbedqError as error:
        fail(error)
    sys.exit(code)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def settings(as_json: bool) -> None:
    """Print every setting with its value and source."""
    print_settings(load({}).describe(), as_json=as_json)


def run(arguments: list[str]) -> NoReturn:
    """Run one command in this process."""
    exit_on_windows("embedq-worker")
    try:
        cli(arguments, prog_name="embedq-worker")
    except ModuleNotFoundError as error:
        if error.name not in _OF_CPU_EXTRA:
            raise
        click.echo(
            f"embedq-worker: The package {error.name} is not installed. "
            "Run: pip install 'embedq[cpu]'",
            err=True,
        )
        sys.exit(exit_codes.SETTINGS)
    sys.exit(exit_codes.OK)
