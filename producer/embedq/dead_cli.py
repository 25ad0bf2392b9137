"""`embedq dead`: look at texts that were set aside, try them again, or let them go."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from embedq.exits import EXIT_FAILED, EXIT_INPUT, errors_as_sentences

if TYPE_CHECKING:
    from redis import Redis


@click.group()
def dead() -> None:
    """Texts that were set aside because they stop whatever embeds them."""


@dead.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON list instead of lines.")
def list_(as_json: bool) -> None:
    """List the texts that were set aside, newest first, without their text."""
    with errors_as_sentences():
        from embedq import dead as letters
        from embedq.records import plain

        found = letters.fetch_all(_results())
    if as_json:
        shown = [
            {"id": o.id, "code": o.code, "reason": o.reason, "node": o.node, "at": o.at}
            for o in found
        ]
        click.echo(json.dumps(shown))
        return
    for letter in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at))
        click.echo(f"{plain(letter.id)}  {when}  {letter.node}  {letter.code}  {letter.reason}")


@dead.command()
@click.argument("name", metavar="ID")
def show(name: str) -> None:
    """Print one text that was set aside."""
    with errors_as_sentences():
        from embedq import dead as letters

        letter = letters.fetch(_results(), name)
    if letter is None:
        _unknown([name])
        sys.exit(EXIT_INPUT)
    click.echo(letter.text)


@dead.command()
@click.argument("names", metavar="ID...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Append a line of JSON with id and vector for each that works now.",
)
def requeue(names: tuple[str, ...], output: Path | None) -> None:
    """Embed texts once more, after their cause was mended; those that work leave the list."""
    with errors_as_sentences():
        from embedq import dead as letters
        from embedq.client import Client
        from embedq.errors import TextsFailed
        from embedq.resume import writing

        failed, unknown = 0, []
        with Client(on_wait=lambda message: click.echo(f"embedq: {message}", err=True)) as client:
            for name in names:
                letter = letters.fetch(client.redis, name)
                if letter is None:
                    unknown.append(name)
                    continue
                try:
                    vector = client.encode(letter.text, prompt=letter.prompt)
                except TextsFailed as error:
                    failed += 1
                    click.echo(f"{name}  failed again: {next(iter(error.failures.values()))}")
                    continue
                if output is not None:
                    with writing(output), output.open("a", encoding="utf-8") as out:
                        out.write(json.dumps({"id": name, "vector": vector.tolist()}) + "\n")
                letters.drop(client.redis, [name])
                click.echo(f"{name}  embedded")
    if unknown:
        _unknown(unknown)
    sys.exit(EXIT_INPUT if unknown else EXIT_FAILED if failed else 0)


@dead.command()
@click.argument("names", metavar="ID...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Drop all of them.")
def drop(names: tuple[str, ...], everything: bool) -> None:
    """Delete texts that were set aside."""
    with errors_as_sentences():
        from embedq import dead as letters

        results = _results()
        if not names and not everything:
            raise click.UsageError("Name the ids to drop, or --all.")
        # By name alone: a thousand texts of a megabyte each need not be read for one of them.
        chosen = sorted(set(names))
        if everything:
            chosen = [letter.id for letter in letters.fetch_all(results)]
        unknown = [name for name in chosen if not letters.drop(results, [name])]
    click.echo(f"{len(chosen) - len(unknown):,} dropped")
    if unknown:
        _unknown(unknown)
        sys.exit(EXIT_INPUT)


def _results() -> Redis:
    from embedq.patience import patiently
    from embedq.redis_client import open_redis
    from embedq.settings import ProducerSettings, mask_password

    url = ProducerSettings.load().results_url
    client = open_redis(url)
    patiently(client.ping, patience_s=0, on_wait=lambda _: None, where=mask_password(url))
    return client


def _unknown(names: list[str]) -> None:
    click.echo(f"embedq: no text set aside under {', '.join(names)}. See: embedq dead ls", err=True)
