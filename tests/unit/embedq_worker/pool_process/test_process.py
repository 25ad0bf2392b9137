"""Tests of the pool process: its status file and a lost device."""

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
def test_pool_process_detects_an_early_exit_of_its_predecessor(
    before: WorkerState | None, tmp_path: Path
) -> None:
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    if before:
        StatusFile(settings.runtime_dir, "one").write(WorkerStatus("one", before, 0.0, 1))

    pool = PoolProcess(settings)

    assert pool.follows_early_exit == (before is WorkerState.STARTING)


def remove_folder(run: Path) -> None:
    """Remove the folder, as systemd does with /run/user/1000 when its user logs out."""
    shutil.rmtree(run)


def block_folder(run: Path) -> None:
    """Replace the folder by a file, so that writing fails for root too."""
    shutil.rmtree(run)
    run.write_bytes(b"")


@pytest.mark.parametrize("damage", [remove_folder, block_folder])
def test_lost_device_stops_serving_when_the_status_cannot_be_written(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    # An exception would end the task, and Celery would acknowledge a batch that was not rerouted.
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    pool = PoolProcess(settings)
    damage(settings.runtime_dir)

    with pool.engine_call():
        code, _ = pool.record_failure(DeviceLost("Gone.", FailureReason.DEVICE_LOST))

    assert code == FailureReason.DEVICE_LOST
    assert pool.engines is None
    assert pool.status.state is WorkerState.DEGRADED


def test_write_with_retry_returns_after_the_status_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    pool = PoolProcess(settings)
    block_folder(settings.runtime_dir)
    pool.report_idle("No reason.")
    monkeypatch.setattr(time, "sleep", lambda _: settings.runtime_dir.unlink())

    pool.write_with_retry()

    assert StatusFile(settings.runtime_dir, "one").read() == pool.status


def test_removed_runtime_folder_is_created_again(tmp_path: Path) -> None:
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    pool = PoolProcess(settings)
    shutil.rmtree(settings.runtime_dir)

    pool.report_idle("No reason.")

    assert StatusFile(settings.runtime_dir, "one").read() == pool.status
    assert settings.runtime_dir.stat().st_mode & 0o777 == 0o700
