"""Tests of the lock that gives one process exclusive use of an NPU."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from embedq.errors import SettingsError
from embedq_worker.device.placement import acquire, current_holder
from embedq_worker.errors import DeviceBusy

PCI = "0000:00:0b.0"
HOLD = """
import sys
from pathlib import Path
from embedq_worker.device.placement import acquire
held = acquire(sys.argv[1], Path(sys.argv[2]), worker="first")
print("held", flush=True)
sys.stdin.read()
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    """Start a process that holds the device until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, PCI, os.fspath(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_second_process_is_refused_with_pid_and_worker_of_the_holder(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        with pytest.raises(
            DeviceBusy, match=rf"process {first.pid} on .* \(worker first\)"
        ) as caught:
            acquire(PCI, tmp_path)
        assert current_holder(PCI, tmp_path).startswith(f"{first.pid} ")
        assert caught.value.holder == current_holder(PCI, tmp_path)
        first.communicate()


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait(20)

    with acquire(PCI, tmp_path, worker="second") as lock:
        assert lock.path.read_text().startswith(f"{os.getpid()} ")


def test_acquire_waits_for_a_process_that_is_ending(tmp_path: Path) -> None:
    with hold(tmp_path) as first:
        assert first.stdin is not None
        first.stdin.close()  # it is ending now

        acquire(PCI, tmp_path, wait_s=20).release()


def test_locks_of_two_devices_are_independent(tmp_path: Path) -> None:
    with acquire(PCI, tmp_path), acquire("0000:00:0c.0", tmp_path):
        pass
    assert current_holder(PCI, tmp_path) == ""


def test_lock_file_in_a_shared_folder_is_writable_by_all(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)

    with acquire(PCI, tmp_path) as lock:
        assert lock.path.stat().st_mode & 0o777 == 0o666


def test_world_writable_folder_without_sticky_bit_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)

    with pytest.raises(SettingsError, match=r"EMBEDQ_LOCK_DIR: .*install -d -m 1777"):
        acquire(PCI, tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)

    with pytest.raises(SettingsError, match="neither a private folder of this user"):
        acquire(PCI, tmp_path)


def test_symbolic_link_in_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("unchanged")
    (tmp_path / "embedq-npu-0000-00-0b.0.lock").symlink_to(target)

    with pytest.raises(SettingsError, match="cannot be used"):
        acquire(PCI, tmp_path)
    assert target.read_text() == "unchanged"


def test_folder_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    before = len(list(Path("/proc/self/fd").iterdir()))

    with pytest.raises(SettingsError, match=r"EMBEDQ_LOCK_DIR: .*No locks available"):
        acquire(PCI, tmp_path)

    assert len(list(Path("/proc/self/fd").iterdir())) == before
