"""Tests of the private folder of a local run."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedq.errors import LocalStartFailed
from embedq.local.fleet import MAX_SOCKET_PATH_BYTES, RESERVED_BYTES, RuntimeDir

#: Script that creates a folder, prints its path and is killed before it can remove it.
KILLED_OWNER = """
import os, signal
from embedq.local.fleet import RuntimeDir
print(RuntimeDir.create().path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set TMPDIR to a short folder."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="eq") as short:
        monkeypatch.setenv("TMPDIR", short)
        yield Path(short)


def test_folder_is_private_and_removal_may_be_repeated(base: Path) -> None:
    folder = RuntimeDir.create()

    assert folder.path.parent == base
    assert folder.path.stat().st_mode & 0o777 == 0o700

    folder.remove()
    folder.remove()

    assert list(base.iterdir()) == []


@pytest.mark.parametrize("unusable", ["/tmp/" + "long" * 20, "/nowhere", "relative", "/tmp/a b"])
def test_unusable_tmpdir_falls_back_to_tmp(unusable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", unusable)

    folder = RuntimeDir.create()
    socket_path = folder.path / "redis.sock"
    folder.remove()

    assert socket_path.is_relative_to("/tmp")
    assert len(os.fsencode(socket_path)) <= MAX_SOCKET_PATH_BYTES


def test_socket_path_fits_below_the_longest_tmpdir(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 4_194_304)
    longest = base / ("x" * (MAX_SOCKET_PATH_BYTES - RESERVED_BYTES - len(str(base)) - 1))
    longest.mkdir()
    monkeypatch.setenv("TMPDIR", str(longest))

    folder = RuntimeDir.create()
    socket_path = folder.path / "redis.sock"
    folder.remove()

    assert socket_path.is_relative_to(longest)
    assert len(os.fsencode(socket_path)) <= MAX_SOCKET_PATH_BYTES


def test_missing_writable_folder_is_refused_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(LocalStartFailed, match="Set TMPDIR"):
        RuntimeDir.create()


def test_folder_of_a_killed_run_is_removed_by_the_next_run(base: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_OWNER], capture_output=True, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.parent == base
    assert left.is_dir()

    RuntimeDir.create().remove()

    assert not left.exists()


def test_folders_of_live_runs_and_unknown_folders_are_not_removed(base: Path) -> None:
    living = RuntimeDir.create()
    unknown = base / "embedq-notes"
    unknown.mkdir()
    target = base / "target"
    target.mkdir()
    (target / "lock").touch()
    link = base / "embedq-link"
    link.symlink_to(target)

    RuntimeDir.create().remove()

    assert living.path.is_dir()
    assert unknown.is_dir()
    assert target.is_dir()
    living.remove()
