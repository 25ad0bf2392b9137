"""`embedq-worker warm | quantize | tune | trace-binding`: prepare a model for this machine.

What computes is imported by the command that needs it, so that `--help` stays quick.
"""

from __future__ import annotations

import json
import sys
import time

import click

from embedq.errors import EmbedqError
from embedq_worker import exits, logs
from embedq_worker.command import EPILOG, fail, load, model_options


@click.command(epilog=EPILOG)
@model_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def warm(as_json: bool, **options: str | None) -> None:
    """Compile the model for the device and prove it, so that the next start finds it done."""
    settings = load(options)
    logs.send_native_to_stderr()
    from embedq_worker import placed_serving
    from embedq_worker.placement import place

    began = time.monotonic()
    try:
        placement = place(settings)
        claim = placed_serving.claim_device(settings, placement)
        opened = placed_serving.open_placed(settings, placement)
    except EmbedqError as error:
        fail(error)
    engine = opened.standard.engine
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


@click.command(epilog=EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="FILE...")
@click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]")
@click.option("--text-field", default="text", show_default=True, help="Field of the text.")
@click.option("--format", "format_", help="Format of the files: txt, jsonl or csv.")
@click.option(
    "--texts",
    type=click.IntRange(10, 10_000),
    default=300,
    show_default=True,
    help="Most texts for calibration; a thousand more are held out for the report.",
)
@click.option(
    "--min-overlap",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="Keep the result only if this share of top-10 neighbours stays.",
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
    """Make the int8 copy of the model that jobs of class int8 ask for, and judge it.

    FILE holds texts like those that will be embedded: txt, jsonl, csv, or .gz of one.
    """
    settings = load({"model": model})
    logs.send_native_to_stderr()
    from embedq_worker import quantize_run
    from embedq_worker.quantizing import require_nncf

    try:
        require_nncf()
        wanted = quantize_run.Wanted(inputs, text_field, format_, texts, min_overlap)
        found = quantize_run.run(settings, wanted, lambda line: click.echo(line, err=True))
    except EmbedqError as error:
        fail(error)
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
    sys.exit(exits.OK if found.kept else exits.CHECK)


@click.command(epilog=EPILOG)
@click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]")
@click.option(
    "--accuracy",
    type=click.Choice(["standard", "exact", "int8"]),
    default="standard",
    show_default=True,
    help="The class whose engine is tuned.",
)
@click.option(
    "--reserve-cores",
    type=click.IntRange(0, 1024),
    default=0,
    show_default=True,
    help="Cores left to a producer and Redis on this machine.",
)
@click.option("--quick", is_flag=True, help="Fewer texts and rounds: some ten seconds.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def tune(model: str | None, accuracy: str, reserve_cores: int, quick: bool, as_json: bool) -> None:
    """Measure how the engine uses the cores of this machine best, and keep the answer.

    Takes about a minute on an otherwise idle machine; run it before a job, not in its middle: the
    last bits of a vector depend on it.
    """
    settings = load({"model": model})
    logs.send_native_to_stderr()
    from embedq.contract import Accuracy
    from embedq_worker import tune_run

    texts, seconds = (32, 5.0) if quick else (128, 60.0)
    try:
        wanted = tune_run.Wanted(Accuracy(accuracy), reserve_cores, texts, seconds)
        found = tune_run.run(settings, wanted, lambda line: click.echo(line, err=True))
    except EmbedqError as error:
        fail(error)
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))


@click.command("trace-binding", epilog=EPILOG)
@model_options
@click.option("--inferences", type=click.IntRange(1, 1_000_000), default=100, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")
def trace_binding(inferences: int, as_json: bool, **options: str | None) -> None:
    """Count how often the NPU's tensors moved and its command lists changed; best is never."""
    settings = load(options)
    from embedq_worker import binding_trace, placed_serving
    from embedq_worker.placement import place

    try:
        placement = place(settings)
        claim = placed_serving.claim_device(settings, placement)
        found = binding_trace.trace(settings, placement.device, inferences)
    except EmbedqError as error:
        fail(error)
    if claim is not None:
        claim.release()
    click.echo(json.dumps(found.as_dict()) if as_json else "\n".join(found.lines()))
    sys.exit(exits.OK if found.is_pinned else exits.CHECK)
