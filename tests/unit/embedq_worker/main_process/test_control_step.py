"""Tests of the bootstep that applies operator commands."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from fakeredis import FakeRedis
from tests.support.fake_consumer import fake_consumer

from embedq.store.fleet import COMMANDS_KEY, DesiredState, set_desired_state
from embedq_worker.main_process import bootsteps
from embedq_worker.settings import WorkerSettings


class RecordingController:
    """Controller that records the operator commands applied to it."""

    def __init__(self) -> None:
        self.paused = False
        self.commands: list[str] = []

    def disable_npu(self, reason: str, _: float) -> None:
        self.commands.append(f"disable: {reason}")

    def enable_npu(self, _: float) -> None:
        self.commands.append("enable")


def test_command_from_before_the_start_is_ignored_and_later_ones_are_applied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    redis, controller = FakeRedis(), RecordingController()
    monkeypatch.setattr(bootsteps, "open_redis", lambda *_, **__: redis)
    settings = WorkerSettings.load(name="npu0", device="stub", runtime_dir=tmp_path)
    consumer = fake_consumer(settings, controller)
    set_desired_state(redis, "npu0", DesiredState.HEALTHY, "fixed")
    step = bootsteps.ControlStep(consumer)

    step.tick(consumer)
    before = list(controller.commands)
    # From a machine whose clock is years behind.
    command = msgpack.packb([str(DesiredState.HEALTHY), "fixed again", 1e9])
    redis.hset(COMMANDS_KEY, "npu0", command)
    step.tick(consumer)
    set_desired_state(redis, "npu0", DesiredState.DEGRADED, "a new driver")
    step.tick(consumer)

    assert before == []
    assert controller.commands == ["enable", "disable: a new driver"]
