"""A short chaos run delivers every vector once, and the right one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.binaries import program

RUN = Path(__file__).parents[2] / "ops" / "chaos" / "run"


@pytest.mark.redis
@pytest.mark.timeout(360)
def test_short_chaos_run_loses_and_corrupts_nothing(tmp_path: Path) -> None:
    program("redis-server", "redis-server")
    command = [sys.executable, str(RUN), "--minutes", "0.6", "--seed", "7", "--report"]

    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=330)

    assert run.returncode == 0, run.stdout + run.stderr
    [report] = tmp_path.glob("*.json")
    found = json.loads(report.read_text())
    zero = ("lost", "delivered_twice", "wrong", "wrongly_set_aside", "poison_not_set_aside")
    assert {name: found[name] for name in zero} == dict.fromkeys(zero, 0)
    assert found["breaches"] == []
    assert found["left_in_redis"] == {}
    assert found["batches"] > 0
    assert found["kills"] > 0
