"""The state file: replaced whole, readable or absent, in a folder of our own."""

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

STATE = WorkerStatus(
    "worker",
    WorkerState.HEALTHY,
    state_since=12.5,
    pool_pid=7,
    pid=6,
    device="cpu",
    model_info=ModelInfo("label", "ab" * 32, 384, 256),
)


def test_state_comes_back(tmp_path: Path) -> None:
    """What the child writes is what the parent reads, and no other file is left."""
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATE)

    assert file.read() == STATE
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["worker.status"]


def test_last_state_wins(tmp_path: Path) -> None:
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATE)

    failed = replace(STATE, state=WorkerState.FAILED, reason="no model")
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
def test_unreadable_file_is_no_state(content: bytes, tmp_path: Path) -> None:
    """Half a file, another format or an unknown state read as nothing, and never raise."""
    file = StatusFile(tmp_path / "run", "worker")
    (tmp_path / "run" / "worker.status").write_bytes(content)

    assert file.read() is None


def test_removed_and_missing_file_is_no_state(tmp_path: Path) -> None:
    """Removing is safe to repeat."""
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATE)

    file.remove()
    file.remove()

    assert file.read() is None


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    """A file that says more is still read."""
    file = StatusFile(tmp_path / "run", "worker")
    file.write(STATE)
    path = tmp_path / "run" / "worker.status"
    path.write_bytes(msgpack.packb({**msgpack.unpackb(path.read_bytes()), "mood": "good"}))

    assert file.read() == STATE


def test_folder_is_private(tmp_path: Path) -> None:
    """A new folder is for its owner only, parents included in the making."""
    folder = private_dir(tmp_path / "a" / "b")

    assert folder.stat().st_mode & 0o777 == 0o700


def test_link_and_open_folder_are_refused(tmp_path: Path) -> None:
    """A folder that another user could have prepared is named with the next step."""
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
    """A folder that belongs to someone else is not ours, whatever its mode."""
    (tmp_path / "theirs").mkdir(mode=0o700)
    os.chown(tmp_path / "theirs", 65534, 65534)

    with pytest.raises(SettingsError, match="not a folder of this user"):
        private_dir(tmp_path / "theirs")
