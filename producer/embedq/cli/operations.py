"""Commands for operators: `embedq status`, `embedq dead` and `embedq exporter`."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from embedq.bulk.request import format_duration
from embedq.cli.common import EXIT_SETTINGS
from embedq.cli.console import EXIT_FAILED, EXIT_INPUT, EXIT_OK, exit_on_error

if TYPE_CHECKING:
    from redis import Redis
    from rich.console import Group

    from embedq.observability.status import FleetStatus

#: Refresh interval of --watch, in seconds.
WATCH_EVERY_S = 1.0

#: Timeouts of a connection to Redis and of an answer, in seconds. A scrape may wait six times for
#: them (snapshot and ping, with retries); Prometheus ends a scrape after 5 s.
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 0.5, 0.7

_COLORS = {"healthy": "green", "degraded": "yellow", "probing": "yellow", "failed": "red"}


@click.command()
@click.option("--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def status(watch: bool, as_json: bool) -> None:
    """Show workers, queues and jobs."""
    with exit_on_error():
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        from embedq.errors import QueueUnavailable, SettingsError

        if watch and as_json:
            raise SettingsError("--watch and --json exclude each other. Drop one of the two.")
        fetch = _status_fetcher()
        if as_json:
            click.echo(json.dumps(fetch().as_dict()))
        elif not watch:
            Console().print(render(fetch()))
        else:
            with Live(render(fetch()), console=Console(), screen=False) as live:
                try:
                    while True:
                        time.sleep(WATCH_EVERY_S)
                        try:
                            live.update(render(fetch()))
                        except QueueUnavailable as error:  # Redis may come back
                            live.update(Text(str(error), style="red"))
                except KeyboardInterrupt:
                    return


def _status_fetcher() -> Callable[[], FleetStatus]:
    # Its result reuses the same connections on every call.
    from embedq.observability.status import fetch_status
    from embedq.settings import ProducerSettings
    from embedq.store.connection import RedisConnection

    settings = ProducerSettings.load()
    broker = RedisConnection.open(settings.broker_url)
    results = RedisConnection.open(settings.results_url)
    both = replace(results, address=settings.addresses)

    def fetch() -> FleetStatus:
        # Each is pinged first, so that an error names the Redis that cannot be reached.
        broker.call(broker.client.ping)
        results.call(results.client.ping)
        return both.call(lambda: fetch_status(broker.client, results.client))

    return fetch


def render(found: FleetStatus) -> Group:
    """Return a status as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    # Text that others wrote is wrapped in Text, so that brackets in it are not markup.
    workers = Table(
        "worker", "state", "device", "engine", "precision", "state_since", "reason", box=None
    )
    for worker in found.workers:
        state = Text(worker.state, style=_COLORS.get(worker.state, ""))
        computes = map(Text, (worker.device, worker.engine, worker.precision))
        since = f"{format_duration(found.at - worker.state_since)} ago"
        workers.add_row(Text(worker.worker), state, *computes, since, Text(worker.reason))
    for name, at in sorted(found.silent.items()):
        state, since = Text("silent", style="red"), f"{format_duration(found.at - at)} ago"
        workers.add_row(Text(name), state, "", "", "", since, "Stopped without deregistering.")
    queues = Table("queue", "waiting", "oldest", box=None)
    for queue, waiting in found.queues.items():
        queues.add_row(queue, f"{waiting:,}", format_duration(found.oldest_ready_s.get(queue, 0)))
    queues.add_row("in flight", f"{found.unacked:,}", format_duration(found.oldest_unacked_s))
    jobs = Table("job", "texts done", "batches done", "to collect", "age", "output", box=None)
    for job in found.jobs:
        texts = f"{job.texts:,}"
        if job.planned_texts:
            texts += f" of {job.planned_texts:,} ({job.texts / job.planned_texts:.0%})"
        batches = f"{job.committed:,} of {job.published:,} sent"
        age, label = format_duration(job.age_s), Text(job.label)
        jobs.add_row(Text(job.id), texts, batches, f"{job.waiting:,}", age, label)
    memory = "  ".join(f"{name} {load.ratio:.0%}" for name, load in found.memory.items())
    head = ""
    if found.paused:
        head = f"paused {format_duration(found.at - found.paused.at)} ago: {found.paused.reason}\n"
    missing = "no live worker\n" if not found.workers else ""
    return Group(
        Text(head + missing, style="red", end=""),
        workers,
        queues,
        jobs,
        f"memory of Redis: {memory}",
        *([f"dead letters: {found.dead:,} (embedq dead ls)"] if found.dead else []),
    )


@click.group()
def dead() -> None:
    """Manage dead letters: texts that no worker process survived."""


@dead.command("ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_(as_json: bool) -> None:
    """List the dead letters, newest first, without their texts."""
    with exit_on_error():
        from embedq.protocol.worker import strip_control_chars
        from embedq.store import dead_letters as letters

        found = letters.fetch_all(_results())
    if as_json:
        shown = [
            {"id": o.id, "code": o.code, "reason": o.reason, "worker": o.worker, "at": o.at}
            for o in found
        ]
        click.echo(json.dumps(shown))
        return
    for letter in found:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(letter.at))
        click.echo(
            f"{strip_control_chars(letter.id)}  {when}  {letter.worker}  {letter.code}  "
            f"{letter.reason}"
        )


@dead.command()
@click.argument("name", metavar="ID")
def show(name: str) -> None:
    """Print the text of one dead letter."""
    with exit_on_error():
        from embedq.store import dead_letters as letters

        letter = letters.fetch(_results(), name)
    if letter is None:
        _exit_unknown([name])
    click.echo(letter.text)


@dead.command()
@click.argument("names", metavar="ID...", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="File to append to: one JSON line with id and vector per embedded text.",
)
def requeue(names: tuple[str, ...], output: Path | None) -> None:
    """Embed dead letters again, once their cause is fixed, and delete those that succeed."""
    with exit_on_error():
        from embedq.client import Client
        from embedq.errors import TextsFailed, writing
        from embedq.store import dead_letters as letters

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
        _exit_unknown(unknown)
    sys.exit(EXIT_FAILED if failed else EXIT_OK)


@dead.command()
@click.argument("names", metavar="ID...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Delete all dead letters.")
def drop(names: tuple[str, ...], everything: bool) -> None:
    """Delete dead letters."""
    with exit_on_error():
        from embedq.store import dead_letters as letters

        results = _results()
        if not names and not everything:
            raise click.UsageError("Name the ids to delete, or --all.")
        # By id, without reading the texts, which may have a megabyte each.
        chosen = sorted(set(names))
        if everything:
            chosen = [letter.id for letter in letters.fetch_all(results)]
        unknown = [name for name in chosen if not letters.drop(results, [name])]
    click.echo(f"{len(chosen) - len(unknown):,} dropped")
    if unknown:
        _exit_unknown(unknown)


def _results() -> Redis:
    from embedq.settings import ProducerSettings
    from embedq.store.connection import RedisConnection

    results = RedisConnection.open(ProducerSettings.load().results_url)
    results.call(results.client.ping)
    return results.client


def _exit_unknown(names: list[str]) -> NoReturn:
    click.echo(f"embedq: no dead letter {', '.join(names)}. See: embedq dead ls", err=True)
    sys.exit(EXIT_INPUT)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=9469,
    show_default=True,
    help="Port to listen on; 0 for any.",
)
def exporter(host: str, port: int) -> None:
    """Serve metrics for Prometheus on /metrics and health checks on /healthz."""
    with exit_on_error():
        from embedq.settings import ProducerSettings
        from embedq.store.connection import open_redis

        try:
            from embedq.observability.exporter import serve
        except ModuleNotFoundError:
            from embedq.errors import SettingsError

            raise SettingsError(
                "embedq exporter needs the Prometheus client. Run: pip install 'embedq[exporter]'"
            ) from None
        settings = ProducerSettings.load()
        broker, results = (
            open_redis(url, connect_timeout_s=CONNECT_TIMEOUT_S, timeout_s=ANSWER_TIMEOUT_S)
            for url in (settings.broker_url, settings.results_url)
        )
        try:
            server = serve(broker, results, host, port)
        except OSError as error:
            click.echo(f"embedq: cannot listen on {host}:{port} ({error.strerror}).", err=True)
            sys.exit(EXIT_SETTINGS)
        click.echo(f"embedq exporter: http://{host}:{server.server_port}/metrics", err=True)
        # The first process of a container ignores SIGTERM without a handler.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
