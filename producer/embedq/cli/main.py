"""The command `embedq`: embeds files and searches their vectors."""

from __future__ import annotations

import time

BEGAN = time.monotonic()  # before the imports, which are part of the duration of the command

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from embedq import errors
from embedq.bulk.readers import FORMATS, Fields
from embedq.cli.common import exit_on_windows, print_settings
from embedq.cli.console import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, exit_on_error
from embedq.cli.operations import dead, exporter, status
from embedq.protocol.contract import Accuracy, Dtype, OnLong

if TYPE_CHECKING:
    from embedq.bulk.request import EmbedRequest
    from embedq.cli.console import RunDisplay
    from embedq.client import Client
    from embedq.settings import ProducerSettings

_EPILOG = """\b
Exit codes:
  0 done    1 done, but some texts failed    2 wrong setting or option
  3 input or output    4 no Redis or no worker    5 the local worker did not start
  6 a result was lost    130 interrupted; the same command continues
\b
Examples:
  embedq embed documents.jsonl -o vectors.npy --local
  zcat big.jsonl.gz | embedq embed - -o vectors.parquet
  EMBEDQ_BROKER_URL=redis://queue:6379/0 embedq embed 'part-*.csv' -o vectors.jsonl
"""

_local = click.option(
    "--local", is_flag=True, help="Start a private Redis and one worker for this command."
)
_model = click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
    help="Turn files of texts into vectors, with a fleet of workers or a local one.",
)
@click.version_option(package_name="embedq")
def cli() -> None:
    """Group of all commands."""


@cli.command(epilog=_EPILOG)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="File to write: .npy (with a sidecar .items.jsonl), .jsonl or .parquet.",
)
@_local
@_model
@click.option(
    "--accuracy",
    type=click.Choice([str(choice) for choice in Accuracy]),
    help="standard: cosine >= 0.999 to fp32; exact: fp32; int8: from a quantized model.  "
    "[EMBEDQ_ACCURACY]",
)
@click.option(
    "--dtype",
    type=click.Choice([str(choice) for choice in Dtype]),
    help="float16 halves the size of vectors, with errors of at most 2**-12.  [EMBEDQ_DTYPE]",
)
@click.option(
    "--strict", is_flag=True, default=None, help="Compute vectors on NPUs only.  [EMBEDQ_STRICT]"
)
@click.option(
    "--on-long",
    type=click.Choice([str(choice) for choice in OnLong]),
    help="What to do with texts of more tokens than the model accepts.  [EMBEDQ_ON_LONG]",
)
@click.option("--prompt-name", help="Name of a prompt of the model to put before each text.")
@click.option("--prompt", help="Prompt to put before each text; overrides --prompt-name.")
@click.option(
    "--text-field", default="text", show_default=True, help="Field or column of the text."
)
@click.option("--id-field", default="id", show_default=True, help="Field or column of the id.")
@click.option("--format", "format_", type=click.Choice(FORMATS), help="Format of the inputs.")
@click.option(
    "--on-bad-line",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="On a line that cannot be parsed: stop and name it, or skip and count it.",
)
@click.option("--restart", is_flag=True, help="Discard the rows of an earlier run and start over.")
@click.option(
    "--update",
    is_flag=True,
    help="Bring a finished output up to date: embed new and changed documents, drop removed ones.",
)
@click.option(
    "--dry-run", is_flag=True, help="Estimate tokens, time and memory from a sample; write nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON summary on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
def embed(
    inputs: tuple[str, ...],
    output: Path,
    local: bool,
    model: str | None,
    accuracy: str | None,
    dtype: str | None,
    strict: bool | None,
    on_long: str | None,
    prompt_name: str | None,
    prompt: str | None,
    text_field: str,
    id_field: str,
    format_: str | None,
    on_bad_line: str,
    restart: bool,
    update: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Embed the documents of INPUT files (.jsonl, .csv, .txt, .gz of one, or - for stdin).

    The same command continues where a killed or interrupted one stopped.
    """
    with exit_on_error(), _interruptible(output, restart=restart):
        from embedq.bulk.request import EmbedRequest, RunSummary
        from embedq.cli.console import RunDisplay  # heavy, and not needed for --help
        from embedq.settings import ProducerSettings

        settings = ProducerSettings.load(
            model=model, accuracy=accuracy, dtype=dtype, strict=strict, on_long=on_long
        )
        request = EmbedRequest(
            inputs=inputs,
            output=output,
            fields=Fields(id=id_field, text=text_field),
            format=format_,
            skip_bad_lines=on_bad_line == "skip",
            prompt_name=prompt_name,
            prompt=prompt,
            restart=restart,
            pin_engine=local,
        )
        if restart and update:
            raise errors.SettingsError(
                "--restart and --update exclude each other: --restart discards the old rows, "
                "--update keeps unchanged ones. Drop one of the two."
            )
        _check_files(request)
        with (
            RunDisplay(quiet=quiet or as_json) as display,
            _connected(settings, display, local=local) as client,
        ):
            # These import Celery, while the worker of a local run starts.
            from embedq.bulk.estimate import Estimate, estimate
            from embedq.bulk.run import EmbedRun
            from embedq.bulk.update import UpdateRun

            display.workers = client.workers
            if dry_run:
                result: Estimate | RunSummary = estimate(client, request)
            else:
                run = UpdateRun if update else EmbedRun
                result = run(client, request, display, BEGAN).run()
    lines = [json.dumps(result.as_dict())] if as_json else result.lines()
    click.echo("\n".join(lines))
    failed = isinstance(result, RunSummary) and result.failed
    sys.exit(EXIT_FAILED if failed else EXIT_OK)


@cli.command(epilog=_EPILOG)
@click.argument("vectors", type=click.Path(path_type=Path))
@click.argument("query")
@click.option(
    "-k",
    "--top",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Number of rows to show.",
)
@_local
@_model
@click.option("--prompt-name", help="Name of a prompt of the model to put before the query.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list on stdout.")
def search(
    vectors: Path,
    query: str,
    top: int,
    local: bool,
    model: str | None,
    prompt_name: str | None,
    as_json: bool,
) -> None:
    """Show the rows of an .npy output that are nearest to a query."""
    with exit_on_error():
        from embedq.bulk.search import load_manifest, nearest_rows
        from embedq.cli.console import RunDisplay
        from embedq.settings import ProducerSettings

        settings = ProducerSettings.load(model=model)
        manifest = load_manifest(vectors)
        display = RunDisplay(quiet=True)
        with _connected(settings, display, local=local) as client:
            served, made_with = client.model_info(), manifest.settings
            if served.identity != made_with["model"]:
                raise errors.InputError(
                    f"{vectors} was made with {made_with['model_label']} "
                    f"({made_with['model'][:12]}); the worker serves {served.label} "
                    f"({served.identity[:12]}). Vectors of two models cannot be compared. Use a "
                    "worker of the first model."
                )
            hits = nearest_rows(vectors, client.encode(query, prompt_name=prompt_name), top)
    if as_json:
        click.echo(json.dumps([hit._asdict() for hit in hits]))
    else:
        for hit in hits:
            click.echo(f"{hit.score:.4f}  {hit.id}")


def _check_files(request: EmbedRequest) -> None:
    from embedq.bulk import writers
    from embedq.bulk.readers import format_of

    writers.require_writable(request.output)
    inputs = request.files()
    for name in inputs:
        format_of(name, request.format)
    writers.check_not_an_input(request.output, inputs)


@contextmanager
def _connected(settings: ProducerSettings, display: RunDisplay, *, local: bool) -> Iterator[Client]:
    if not local:
        from embedq.client import Client

        with Client(settings=settings, on_wait=display.note) as client:
            yield client
        return
    from embedq.local.fleet import LocalFleet

    display.starting("starting a private Redis and a worker")
    environment = {"EMBEDQ_MODEL": settings.model, "EMBEDQ_STRICT": str(settings.strict)}
    if settings.accuracy is not Accuracy.STANDARD:
        environment["EMBEDQ_DEVICE"] = "cpu"  # fp32 and int8 run on the CPU only
    with LocalFleet(environment=environment, warn=display.note) as fleet:
        from embedq.client import Client  # imports Celery, while the worker starts

        at = {"broker_url": fleet.broker_url, "results_url": fleet.results_url}
        private = settings.model_copy(update=at)
        with Client(settings=private, on_wait=display.note, on_idle=fleet.check) as client:
            yield client


@contextmanager
def _interruptible(output: Path, *, restart: bool) -> Iterator[None]:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    began = time.time()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        command = "the same command"
        if restart:
            from embedq.bulk.checkpoint import manifest_path

            # Before the restart saves its manifest, a run without --restart would resume old rows.
            manifest = manifest_path(output)
            if manifest.exists() and manifest.stat().st_mtime >= began:
                command += " without --restart"
        click.echo(
            f"embedq: interrupted. The rows of {output} so far are saved; {command} continues.",
            err=True,
        )
        sys.exit(EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGTERM, before)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def settings(as_json: bool) -> None:
    """Show every setting with its value and source."""
    with exit_on_error():
        from embedq.settings import ProducerSettings

        print_settings(ProducerSettings.load().describe(), as_json=as_json)


for command in (dead, exporter, status):
    cli.add_command(command)


def main() -> None:
    """Run the command line."""
    exit_on_windows("embedq")
    cli()
