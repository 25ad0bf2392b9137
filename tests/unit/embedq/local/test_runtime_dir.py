"""The private folder of a local run: its place, its lock and the end of forgotten ones."""

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

#: Makes a folder, says where, and is killed before it can remove it.
KILLED_OWNER = """
import os, signal
from embedq.local.fleet import RuntimeDir
print(RuntimeDir.create().path, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that TMPDIR names, short whatever the machine's own is."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="eq") as short:
        monkeypatch.setenv("TMPDIR", short)
        yield Path(short)


def test_folder_is_private_and_removed(base: Path) -> None:
    """The folder is below TMPDIR, for its owner only, and goes with remove(), twice if need be."""
    folder = RuntimeDir.create()

    assert folder.path.parent == base
    assert folder.path.stat().st_mode & 0o777 == 0o700

    folder.remove()
    folder.remove()

    assert list(base.iterdir()) == []


@pytest.mark.parametrize("unfit", ["/tmp/" + "long" * 20, "/nowhere", "relative", "/tmp/a b"])
def test_unfit_tmpdir_falls_back(unfit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TMPDIR that is too long for a socket, absent or odd is passed over for /tmp."""
    monkeypatch.setenv("TMPDIR", unfit)

    folder = RuntimeDir.create()
    socket_path = folder.path / "redis.sock"
    folder.remove()

    assert socket_path.is_relative_to("/tmp")
    assert len(os.fsencode(socket_path)) <= MAX_SOCKET_PATH_BYTES


def test_longest_base_leaves_room_for_a_socket(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even below the longest base that is taken, with the longest process id, a socket fits."""
    monkeypatch.setattr(os, "getpid", lambda: 4_194_304)
    longest = base / ("x" * (MAX_SOCKET_PATH_BYTES - RESERVED_BYTES - len(str(base)) - 1))
    longest.mkdir()
    monkeypatch.setenv("TMPDIR", str(longest))

    folder = RuntimeDir.create()
    socket_path = folder.path / "redis.sock"
    folder.remove()

    assert socket_path.is_relative_to(longest)
    assert len(os.fsencode(socket_path)) <= MAX_SOCKET_PATH_BYTES


def test_nowhere_to_write_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any place, the error says which variable to set."""
    monkeypatch.setattr(os, "access", lambda *_: False)

    with pytest.raises(LocalStartFailed, match="Set TMPDIR"):
        RuntimeDir.create()


def test_folder_of_a_killed_run_is_swept(base: Path) -> None:
    """A run killed with SIGKILL leaves its folder; the next run removes it."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_OWNER], capture_output=True, text=True, check=False
    )
    left = Path(killed.stdout.strip())
    assert left.parent == base
    assert left.is_dir()

    RuntimeDir.create().remove()

    assert not left.exists()


def test_living_and_strange_folders_are_left_alone(base: Path) -> None:
    """A sweep touches neither the folder of a living run nor one that it cannot tell for dead."""
    living = RuntimeDir.create()
    strange = base / "embedq-notes"
    strange.mkdir()
    target = base / "target"
    target.mkdir()
    (target / "lock").touch()
    link = base / "embedq-link"
    link.symlink_to(target)

    RuntimeDir.create().remove()

    assert living.path.is_dir()
    assert strange.is_dir()
    assert target.is_dir()
    living.remove()
