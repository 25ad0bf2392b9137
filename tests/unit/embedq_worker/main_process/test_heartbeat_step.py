"""Tests of the bootstep that publishes heartbeats."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from tests.support.fake_consumer import fake_consumer

from embedq.store import fleet
from embedq_worker.main_process.bootsteps import HeartbeatStep
from embedq_worker.main_process.controller import WorkerController
from embedq_worker.settings import WorkerSettings


def test_heartbeats_continue_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WorkerSettings.load(name="one", device="stub", runtime_dir=tmp_path, heartbeat_s=5)
    consumer = fake_consumer(settings, WorkerController(settings, None))
    published_at: list[float] = []
    monkeypatch.setattr(
        fleet, "publish_heartbeat", lambda _, heartbeat: published_at.append(heartbeat.at)
    )
    seconds = itertools.count(100.0, 6.0)
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    step = HeartbeatStep(consumer)

    for now in (5000.0, 1400.0, 1406.0):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        step.tick(consumer)

    assert published_at == [5000.0, 1400.0, 1406.0]
