"""`embedq-worker health` beside a real node."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.servers import NodeProcess, RedisProcess, environment, stub_node, wait_for

from embedq import Client
from embedq.protocol.worker import Heartbeat
from embedq_worker.main_process import liveness


def check(node: NodeProcess, *options: str) -> tuple[int, str]:
    """Return exit code and output of a health check in the environment of a node."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", "health", *options],
        env=environment(EMBEDQ_RUNTIME_DIR=os.fspath(node.runtime_dir), EMBEDQ_NAME=node.name),
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout.strip()


def wait_beat(
    node: NodeProcess, what: str, right: Callable[[liveness.Pulse], bool]
) -> liveness.Pulse:
    """Wait for a pulse of a kind."""

    def look() -> liveness.Pulse | None:
        found = next(liveness.read_all(node.runtime_dir, node.name), None)
        return found if found and right(found) else None

    return wait_for(look, what)


def _if_unwell(found: tuple[int, str]) -> str:
    return found[1] if found[0] == 1 else ""


def test_node_that_hangs_is_stale_and_one_without_broker_lives(
    redis: RedisProcess, short_dir: Path
) -> None:
    """A stopped parent is stale within the age asked for; without Redis it beats, not ready."""
    with stub_node(redis, short_dir) as node:
        serving = wait_beat(node, "a pulse of a node that serves", liveness.Pulse.may_serve)
        well = check(node)
        os.kill(serving.pid, signal.SIGSTOP)
        hung = wait_for(lambda: _if_unwell(check(node, "--max-age-s", "3")), "a stale pulse")
        os.kill(serving.pid, signal.SIGCONT)
        redis.stop()
        lost = wait_beat(node, "the broker to be missed", lambda found: not found.connected)
        wait_beat(node, "beats without a broker", lambda found: found.at > lost.at + 2)
        code, shown = check(node, "--json")

    answer: dict[str, Any] = json.loads(shown)
    assert well == (0, "stub healthy: lives")
    assert "the limit is 3 s" in hung
    assert (code, answer["well"], answer["ready"]) == (0, True, False)
    assert answer["nodes"][0]["age_s"] < 10


def test_node_that_never_ran_is_unwell(node: NodeProcess, tmp_path: Path) -> None:
    """A folder without a pulse is a node that is not there."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", "health"],
        env=environment(EMBEDQ_RUNTIME_DIR=os.fspath(tmp_path)),
        capture_output=True,
        text=True,
    )

    assert done.returncode == 1
    assert done.stdout == f"no node has run in {tmp_path} (EMBEDQ_RUNTIME_DIR)\n"


def test_node_tells_what_it_has_computed(node: NodeProcess, client: Client) -> None:
    """Texts, tokens and inferences of a job arrive in the heartbeat, and nothing is at work."""

    def told() -> Heartbeat | None:
        beat = node.heartbeat()
        return beat if beat and beat.totals.get("texts", 0) >= before + 40 else None

    first = node.heartbeat()
    before = first.totals.get("texts", 0) if first else 0
    client.encode([f"text {number}" for number in range(40)])
    totals = wait_for(told, "totals in the heartbeat").totals

    assert totals["texts"] == before + 40
    assert totals["tokens"] >= 80  # two special tokens each
    assert totals["inferences"] >= totals["batches"] >= 1
    assert totals["infer_s"] > 0
    assert {"duplicates", "refused"} <= totals.keys()  # of earlier tests, perhaps
    wait_beat(node, "the engine to rest", lambda found: found.engine_since is None)


@pytest.mark.parametrize("arguments", [["health", "--help"], ["health", "--max-age-s", "x"]])
def test_help_and_mistakes_of_the_check(arguments: list[str]) -> None:
    """The check explains itself, and a wrong option is not taken for a sick node."""
    done = subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
    )

    assert done.returncode == (0 if "--help" in arguments else 2)
    assert "--max-age-s" in done.stdout + done.stderr
