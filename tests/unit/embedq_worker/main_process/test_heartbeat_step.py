"""Tests of the bootstep that publishes heartbeats."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
from tests.support.fake_consumer import fake_consumer

from embedq.protocol.worker import WorkerState, WorkerStatus
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


def test_counters_of_replaced_pool_processes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WorkerSettings.load(name="one", device="stub", runtime_dir=tmp_path)
    controller = WorkerController(settings, None)
    consumer = fake_consumer(settings, controller)
    totals: list[dict[str, float]] = []
    monkeypatch.setattr(
        fleet, "publish_heartbeat", lambda _, heartbeat: totals.append(heartbeat.totals)
    )
    step = HeartbeatStep(consumer)

    for pid, rerouted, infer_s in ((7, 2, 1.5), (7, 3, 2.0), (8, 0, 0.0), (8, 1, 0.5)):
        status = WorkerStatus(
            "one",
            WorkerState.HEALTHY,
            float(pid),
            pid,
            totals={"rerouted": rerouted, "infer_s": infer_s},
        )
        controller.update(status, now=1.0, now_s=1.0)
    step.tick(consumer)

    assert (totals[0]["rerouted"], totals[0]["infer_s"], totals[0]["refused"]) == (4, 2.5, 0)
