"""The smaller commands: what they refuse, and with which exit code."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from fakeredis import FakeRedis

from embedq import dead, dead_cli, status_cli
from embedq.exits import EXIT_INPUT, EXIT_SETTINGS
from embedq.exporter_cli import exporter
from embedq.orders import Pause
from embedq.status import FleetStatus


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> FakeRedis:
    """A Redis with one text set aside, which is what the commands open."""
    redis = FakeRedis()
    letter = dead.new("job", 0, 1, code="poison", reason="", node="n", prompt="", text="a text")
    dead.add(redis, letter)
    monkeypatch.setattr(dead_cli, "_results", lambda: redis)
    return redis


def test_dropping_what_is_not_there_drops_the_rest(letters: FakeRedis) -> None:
    """A typo among many ids is named, and stops none of the others."""
    run = CliRunner().invoke(dead_cli.dead, ["drop", "nope", "job:0:1"])

    assert run.exit_code == EXIT_INPUT
    assert "1 dropped" in run.output
    assert "no text set aside under nope" in run.output
    assert not dead.fetch_all(letters)


@pytest.mark.parametrize("command", ["show", "drop"])
def test_unknown_id_is_an_error(command: str, letters: FakeRedis) -> None:
    """Nobody takes a typo for something that is done."""
    run = CliRunner().invoke(dead_cli.dead, [command, "nope"])

    assert run.exit_code == EXIT_INPUT
    assert "no text set aside under nope" in run.output
    assert len(dead.fetch_all(letters)) == 1


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_port_that_is_none_is_refused(port: str) -> None:
    """The message has the limits."""
    run = CliRunner().invoke(exporter, ["--port", port])

    assert run.exit_code == EXIT_SETTINGS
    assert "0<=x<=65535" in run.output


def test_watch_and_json_exclude_each_other() -> None:
    """One of them would be ignored."""
    run = CliRunner().invoke(status_cli.status, ["--watch", "--json"])

    assert run.exit_code == EXIT_SETTINGS
    assert "exclude each other" in run.output


def test_pause_is_shown_with_its_reason() -> None:
    """Who looks wants to know why nothing moves, and since when."""
    paused = Pause("upgrade", 400.0)
    found = FleetStatus(1000.0, [], {}, 0, 0.0, [], {}, paused)

    head = status_cli.render(found).renderables[0]

    assert "paused 10 min 0 s ago: upgrade" in str(head)


def test_damaged_letter_keeps_no_other_from_being_dropped(letters: FakeRedis) -> None:
    """Only what is named is touched: there may be a thousand texts of a megabyte each."""
    letters.hset(dead.DEAD_KEY, "damaged", b"x")

    run = CliRunner().invoke(dead_cli.dead, ["drop", "job:0:1"])

    assert run.exit_code == 0, run.output
    assert not letters.hexists(dead.DEAD_KEY, "job:0:1")
