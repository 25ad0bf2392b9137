"""When a node tells the fleet how it is."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedq.store import fleet
from embedq_worker.main_process.bootsteps import TellFleet
from embedq_worker.main_process.controller import Guard
from embedq_worker.settings import WorkerSettings


def test_clock_that_is_set_back_does_not_silence_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat fades within seconds, and producers would take it for dead."""
    settings = WorkerSettings.load(name="one", device="stub", runtime_dir=tmp_path, heartbeat_s=5)
    conf = SimpleNamespace(embedq=settings, embedq_guard=Guard(settings, None))
    node = SimpleNamespace(app=SimpleNamespace(conf=conf))
    told: list[float] = []
    monkeypatch.setattr(fleet, "beat", lambda _, heartbeat: told.append(heartbeat.at))
    seconds = itertools.count(100.0, 6.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    step = TellFleet(node)

    for now in (5000.0, 1400.0, 1406.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        step.tick(node)

    assert told == [5000.0, 1400.0, 1406.0]
