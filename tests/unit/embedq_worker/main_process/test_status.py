"""Tests of the status file of a pool process and of private folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest

from embedq.errors import SettingsError
from embedq.protocol.worker import ModelInfo, WorkerState, WorkerStatus
from embedq_worker.files import private_dir
from embedq_worker.main_process.status import StatusFile

STATUS = WorkerStatus(
    "worker",
    WorkerState.HEALTHY,
    state_since=12.5,
    pool_pid=7,
    pid=6,
    device="cpu",
    model_info=ModelInfo("label", "ab" * 32, 384, 256),
)


def test_status_survives_its_file(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATUS)

    assert file.read() == STATUS
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["worker.status"]


def test_last_status_replaces_the_file(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATUS)

    failed = replace(STATUS, state=WorkerState.FAILED, reason="no model")
    file.write(failed)

    assert file.read() == failed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc1",
        b"\x01",
        b"\x90",
        msgpack.packb({"worker": "worker", "state": "dancing", "state_since": 1.0}),
        msgpack.packb({"pid": 1}),
    ],
    ids=repr,
)
def test_unreadable_file_reads_as_none(content: bytes, tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "run", "worker")
    (tmp_path / "run" / "worker.status").write_bytes(content)

    assert file.read() is None


def test_removed_file_reads_as_none(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATUS)

    file.remove()
    file.remove()

    assert file.read() is None


def test_unknown_field_is_ignored(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATUS)
    path = tmp_path / "run" / "worker.status"
    path.write_bytes(msgpack.packb({**msgpack.unpackb(path.read_bytes()), "mood": "good"}))

    assert file.read() == STATUS


def test_new_folder_is_private(tmp_path: Path) -> None:
    folder = private_dir(tmp_path / "a" / "b")

    assert folder.stat().st_mode & 0o777 == 0o700


def test_symbolic_link_open_folder_and_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "file").touch()

    with pytest.raises(SettingsError, match="Remove it, or name another"):
        private_dir(tmp_path / "link")
    with pytest.raises(SettingsError, match="chmod 700"):
        private_dir(tmp_path / "open")
    with pytest.raises(SettingsError, match="cannot be used as a folder"):
        private_dir(tmp_path / "file")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir(mode=0o700)
    os.chown(tmp_path / "foreign", 65534, 65534)

    with pytest.raises(SettingsError, match="not a folder of this user"):
        private_dir(tmp_path / "foreign")
