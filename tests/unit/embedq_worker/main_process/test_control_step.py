"""Which orders of an operator a worker obeys when it hears them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest
from fakeredis import FakeRedis

from embedq.store.fleet import COMMANDS_KEY, DesiredState, set_desired_state
from embedq_worker.main_process import bootsteps
from embedq_worker.settings import WorkerSettings


class Obedient:
    """A guard that notes what it is told."""

    def __init__(self) -> None:
        self.paused = False
        self.told: list[str] = []

    def disable_npu(self, reason: str, _: float) -> None:
        """Note that the NPU is to be left alone."""
        self.told.append(f"hold {reason}")

    def enable_npu(self, _: float) -> None:
        """Note that it may be tried."""
        self.told.append("release")


def test_order_to_recover_ends_no_pause_of_a_later_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was given for a fault of then; the one that is given now is for the fault of now."""
    redis, guard = FakeRedis(), Obedient()
    monkeypatch.setattr(bootsteps, "open_redis", lambda *_, **__: redis)
    settings = WorkerSettings.load(name="npu0", device="stub", runtime_dir=tmp_path)
    context = SimpleNamespace(settings=settings, controller=guard)
    worker = SimpleNamespace(app=SimpleNamespace(conf=SimpleNamespace(embedq=context)))
    set_desired_state(redis, "npu0", DesiredState.HEALTHY, "mended")
    step = bootsteps.ControlStep(worker)

    step.tick(worker)
    before = list(guard.told)
    behind = msgpack.packb([str(DesiredState.HEALTHY), "mended again", 1e9])
    redis.hset(COMMANDS_KEY, "npu0", behind)  # from a machine whose clock is years behind
    step.tick(worker)
    set_desired_state(redis, "npu0", DesiredState.DEGRADED, "a new driver")
    step.tick(worker)

    assert before == []
    assert guard.told == ["release", "hold a new driver"]
