"""When a worker tells the fleet how it is."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedq.store import fleet
from embedq_worker.main_process.bootsteps import HeartbeatStep
from embedq_worker.main_process.controller import WorkerContext, WorkerController
from embedq_worker.settings import WorkerSettings


def test_clock_that_is_set_back_does_not_silence_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat fades within seconds, and producers would take it for dead."""
    settings = WorkerSettings.load(name="one", device="stub", runtime_dir=tmp_path, heartbeat_s=5)
    conf = SimpleNamespace(embedq=WorkerContext(settings, WorkerController(settings, None)))
    worker = SimpleNamespace(app=SimpleNamespace(conf=conf))
    told: list[float] = []
    monkeypatch.setattr(fleet, "publish_heartbeat", lambda _, heartbeat: told.append(heartbeat.at))
    seconds = itertools.count(100.0, 6.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    step = HeartbeatStep(worker)

    for now in (5000.0, 1400.0, 1406.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        step.tick(worker)

    assert told == [5000.0, 1400.0, 1406.0]
