"""Tests of the small commands of `embedq`: their refusals, exit codes and output."""

from __future__ import annotations

import io
import time

import msgpack
import pytest
from click.testing import CliRunner
from fakeredis import FakeRedis
from rich.console import Console

from embedq.bulk.request import format_duration
from embedq.cli import operations
from embedq.cli.common import EXIT_SETTINGS
from embedq.cli.console import EXIT_INPUT
from embedq.cli.operations import exporter
from embedq.observability.status import FleetStatus, JobStatus
from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq.store import dead_letters
from embedq.store.fleet import Pause


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> FakeRedis:
    """Dead-letter queue with one text, used by the commands as the results Redis."""
    redis = FakeRedis()
    letter = dead_letters.DeadLetter("job:0:1", "poison", "", "n", time.time(), text="a text")
    dead_letters.add(redis, letter)
    monkeypatch.setattr(operations, "_results", lambda: redis)
    return redis


def test_drop_of_an_unknown_id_still_drops_the_others(letters: FakeRedis) -> None:
    run = CliRunner().invoke(operations.dead, ["drop", "nope", "job:0:1"])

    assert run.exit_code == EXIT_INPUT
    assert "1 dropped" in run.output
    assert "no dead letter nope" in run.output
    assert not dead_letters.fetch_all(letters)


@pytest.mark.parametrize("command", ["show", "drop"])
def test_unknown_dead_letter_id_is_an_error(command: str, letters: FakeRedis) -> None:
    run = CliRunner().invoke(operations.dead, [command, "nope"])

    assert run.exit_code == EXIT_INPUT
    assert "no dead letter nope" in run.output
    assert len(dead_letters.fetch_all(letters)) == 1


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_invalid_port_is_refused_with_the_limits(port: str) -> None:
    run = CliRunner().invoke(exporter, ["--port", port])

    assert run.exit_code == EXIT_SETTINGS
    assert "0<=x<=65535" in run.output


def test_watch_and_json_exclude_each_other() -> None:
    run = CliRunner().invoke(operations.status, ["--watch", "--json"])

    assert run.exit_code == EXIT_SETTINGS
    assert "exclude each other" in run.output


def test_status_shows_age_and_reason_of_a_pause() -> None:
    paused = Pause("upgrade", 400.0)
    found = FleetStatus(1000.0, [], {}, 0, 0.0, [], {}, paused)

    head = operations.render(found).renderables[0]

    assert "paused 10 min 0 s ago: upgrade" in str(head)


def test_damaged_dead_letter_does_not_block_the_drop_of_another(letters: FakeRedis) -> None:
    letters.hset(dead_letters.DEAD_KEY, "damaged", b"x")

    run = CliRunner().invoke(operations.dead, ["drop", "job:0:1"])

    assert run.exit_code == 0, run.output
    assert not letters.hexists(dead_letters.DEAD_KEY, "job:0:1")


def test_status_does_not_read_brackets_as_markup() -> None:
    now = 1000.0
    worker = WorkerStatus(
        "n[a]", WorkerState.DEGRADED, now, reason="cannot open [/dev/accel/accel0]"
    )
    job = JobStatus("j[b]", "out[v2].npy", 0, 0, 1.0)
    found = FleetStatus(now, [worker], {}, 0, 0.0, [job], {}, None, silent={"s[/c]": now})
    shown = io.StringIO()

    Console(width=200, file=shown).print(operations.render(found))

    for words in ("n[a]", "[/dev/accel/accel0]", "j[b]", "out[v2].npy", "s[/c]"):
        assert words in shown.getvalue()


@pytest.mark.parametrize("seconds", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_duration_is_shown_as_zero(seconds: float) -> None:
    assert format_duration(seconds) == "0 s"


def test_unreadable_dead_letters_are_listed_and_can_be_dropped(letters: FakeRedis) -> None:
    letters.hset(dead_letters.DEAD_KEY, "broken", b"junk")
    letters.hset(dead_letters.DEAD_KEY, "forged", msgpack.packb({"id": "x", "at": "never"}))

    listed = CliRunner().invoke(operations.dead, ["ls"])
    dropped = CliRunner().invoke(operations.dead, ["drop", "--all"])

    assert (listed.exit_code, dropped.exit_code) == (0, 0)
    assert "broken" in listed.output
    assert "forged" in listed.output
    assert not letters.exists(dead_letters.DEAD_KEY)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (61, "1 min 1 s"), (3_900, "1 h 5 min"), (90_000, "1 d 1 h")],
)
def test_duration_is_shown_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
