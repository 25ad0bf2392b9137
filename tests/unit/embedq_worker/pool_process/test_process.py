"""What a child makes of the state that the one before it has left."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq_worker.errors import DeviceLost, FailureReason
from embedq_worker.main_process.status import StatusFile
from embedq_worker.pool_process.process import PoolProcess
from embedq_worker.settings import WorkerSettings


@pytest.mark.parametrize("before", [None, *WorkerState])
def test_child_knows_whether_the_one_before_it_came_up(
    before: WorkerState | None, tmp_path: Path
) -> None:
    """Only one that died while it was starting counts; the first child of a worker has none."""
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    if before:
        StatusFile(settings.runtime_dir, "one").write(WorkerStatus("one", before, 0.0, 1))

    child = PoolProcess(settings)

    assert child.follows_early_exit == (before is WorkerState.STARTING)


def taken(run: Path) -> None:
    """Clear the folder away, as systemd does with /run/user/1000 when its user logs out."""
    shutil.rmtree(run)


def full(run: Path) -> None:
    """Leave no room for a file; as root, who may write anywhere, a file is in its place."""
    shutil.rmtree(run)
    run.write_bytes(b"")


@pytest.mark.parametrize("befalls", [taken, full])
def test_child_that_cannot_tell_of_a_lost_device_stops_serving_all_the_same(
    befalls: Callable[[Path], None], tmp_path: Path
) -> None:
    """What it raised would end the task, and Celery would acknowledge a batch that nobody has."""
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    child = PoolProcess(settings)
    befalls(settings.runtime_dir)

    with child.engine_call():
        code, _ = child.record_failure(DeviceLost("Gone.", FailureReason.DEVICE_LOST))

    assert code == FailureReason.DEVICE_LOST
    assert child.engines is None
    assert child.status.state is WorkerState.DEGRADED


def test_child_is_ready_once_its_parent_can_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not written in the moment it is ready would never be: no batch comes before that."""
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    child = PoolProcess(settings)
    full(settings.runtime_dir)
    child.report_idle("No reason.")
    monkeypatch.setattr(time, "sleep", lambda _: settings.runtime_dir.unlink())

    child.write_with_retry()

    assert StatusFile(settings.runtime_dir, "one").read() == child.status


def test_child_tells_again_once_it_can(tmp_path: Path) -> None:
    """A folder that was cleared away is made anew, as private as before."""
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    child = PoolProcess(settings)
    shutil.rmtree(settings.runtime_dir)

    child.report_idle("No reason.")

    assert StatusFile(settings.runtime_dir, "one").read() == child.status
    assert settings.runtime_dir.stat().st_mode & 0o777 == 0o700
