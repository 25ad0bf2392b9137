"""`embedq status`: the fleet in a terminal, once or live."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import isfinite
from typing import TYPE_CHECKING, TypeVar

import click

from embedq.exits import errors_as_sentences

if TYPE_CHECKING:
    from rich.console import Group

    from embedq.status import FleetStatus

T = TypeVar("T")

#: Seconds between two looks with --watch.
WATCH_EVERY_S = 1.0
_COLOURS = {"healthy": "green", "degraded": "yellow", "probing": "yellow", "failed": "red"}


@click.command()
@click.option("--watch", is_flag=True, help="Keep looking until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def status(watch: bool, as_json: bool) -> None:
    """Show nodes, queues and jobs."""
    with errors_as_sentences():
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        from embedq.errors import QueueUnavailable, SettingsError

        if watch and as_json:
            raise SettingsError("--watch and --json exclude each other. Drop one of the two.")
        look = _looker()
        if as_json:
            click.echo(json.dumps(look().as_dict()))
        elif not watch:
            Console().print(render(look()))
        else:
            with Live(render(look()), console=Console(), screen=False) as live:
                try:
                    while True:
                        time.sleep(WATCH_EVERY_S)
                        try:
                            live.update(render(look()))
                        except QueueUnavailable as error:  # Redis starts again: so does this
                            live.update(Text(str(error), style="red"))
                except KeyboardInterrupt:
                    return


def _looker() -> Callable[[], FleetStatus]:
    """Return a function that looks at the fleet of the settings, on connections that it keeps."""
    from embedq.patience import patiently
    from embedq.redis_client import open_redis
    from embedq.settings import ProducerSettings, mask_password
    from embedq.status import fetch_status

    settings = ProducerSettings.load()
    broker, results = open_redis(settings.broker_url), open_redis(settings.results_url)

    def look() -> FleetStatus:
        def once(action: Callable[[], T], where: str) -> T:
            return patiently(action, patience_s=0, on_wait=lambda _: None, where=where)

        # First each alone, so that an error names the one that is away.
        once(broker.ping, mask_password(settings.broker_url))
        once(results.ping, mask_password(settings.results_url))
        return once(lambda: fetch_status(broker, results), settings.addresses)

    return look


def render(found: FleetStatus) -> Group:
    """Draw a status as tables."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    nodes = Table("node", "state", "device", "engine", "precision", "since", "reason", box=None)
    for node in found.nodes:
        state = Text(node.state, style=_COLOURS.get(node.state, ""))
        computes = map(Text, (node.device, node.engine, node.precision))
        since = f"{age(found.at - node.since)} ago"
        nodes.add_row(Text(node.node), state, *computes, since, Text(node.reason))
    for name, at in sorted(found.silent.items()):
        state = Text("silent", style="red")
        nodes.add_row(
            Text(name), state, "", "", "", f"{age(found.at - at)} ago", "It took no leave."
        )
    queues = Table("queue", "waiting", "oldest", box=None)
    for queue, waiting in found.queues.items():
        queues.add_row(queue, f"{waiting:,}", age(found.oldest_ready_s.get(queue, 0)))
    queues.add_row("in hand", f"{found.in_hand:,}", age(found.oldest_in_hand_s))
    jobs = Table("job", "texts done", "batches done", "to be taken", "age", "output", box=None)
    for job in found.jobs:
        texts = f"{job.texts:,}"
        if job.planned_texts:
            texts += f" of {job.planned_texts:,} ({job.texts / job.planned_texts:.0%})"
        batches = f"{job.committed:,} of {job.published:,} sent"
        label = Text(job.label)  # brackets in it are no markup
        jobs.add_row(Text(job.id), texts, batches, f"{job.waiting:,}", age(job.age_s), label)
    memory = "  ".join(f"{name} {ratio:.0%}" for name, ratio in found.redis.items())
    head = ""
    if found.paused:
        head = f"paused {age(found.at - found.paused.at)} ago: {found.paused.reason}\n"
    missing = "no node is alive\n" if not found.nodes else ""
    return Group(
        Text(head + missing, style="red", end=""),
        nodes,
        queues,
        jobs,
        f"memory of Redis: {memory}",
        *([f"texts set aside: {found.dead:,} (embedq dead ls)"] if found.dead else []),
    )


def age(seconds: float) -> str:
    """Return a duration in its two largest units."""
    known = seconds if isfinite(seconds) else 0
    minutes, rest = divmod(max(0, int(known)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    for big, small, names in (
        (days, hours, ("d", "h")),
        (hours, minutes, ("h", "min")),
        (minutes, rest, ("min", "s")),
    ):
        if big:
            return f"{big} {names[0]} {small} {names[1]}"
    return f"{rest} s"
