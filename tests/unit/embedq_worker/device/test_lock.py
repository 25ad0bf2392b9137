"""One process per device, whoever asks, and a dead one holds nothing."""

from __future__ import annotations

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


def test_second_process_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    """Whoever comes second learns who holds the device, and what to do."""
    with hold(tmp_path) as first:
        with pytest.raises(
            DeviceBusy, match=rf"process {first.pid} on .* \(worker first\)"
        ) as caught:
            acquire(PCI, tmp_path)
        assert current_holder(PCI, tmp_path).startswith(f"{first.pid} ")
        assert caught.value.holder == current_holder(PCI, tmp_path)
        first.communicate()


def test_lock_of_a_killed_process_is_taken(tmp_path: Path) -> None:
    """The file still names the dead process, and the lock is free."""
    with hold(tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait(20)

    with acquire(PCI, tmp_path, worker="second") as taken:
        assert taken.path.read_text().startswith(f"{os.getpid()} ")


def test_claim_waits_for_a_predecessor_that_is_dying(tmp_path: Path) -> None:
    """A restarted worker may come before its killed predecessor has let go."""
    with hold(tmp_path) as first:
        assert first.stdin is not None
        first.stdin.close()  # it is ending now

        acquire(PCI, tmp_path, wait_s=20).release()


def test_other_device_is_free(tmp_path: Path) -> None:
    """A lock is of one address."""
    with acquire(PCI, tmp_path), acquire("0000:00:0c.0", tmp_path):
        pass
    assert current_holder(PCI, tmp_path) == ""


def test_shared_folder_lets_the_next_user_write(tmp_path: Path) -> None:
    """In a folder as /run/lock the file belongs to whoever was first, and all may write to it."""
    tmp_path.chmod(0o1777)

    with acquire(PCI, tmp_path) as taken:
        assert taken.path.stat().st_mode & 0o777 == 0o666


def test_folder_that_others_could_have_prepared_is_refused(tmp_path: Path) -> None:
    """A folder that anyone may write to, without the sticky bit, proves nothing."""
    tmp_path.chmod(0o777)

    with pytest.raises(SettingsError, match=r"EMBEDQ_LOCK_DIR: .*install -d -m 1777"):
        acquire(PCI, tmp_path)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    """The lock folder of another user is not ours to trust."""
    os.chown(tmp_path, 12345, 12345)

    with pytest.raises(SettingsError, match="neither a private folder of this user"):
        acquire(PCI, tmp_path)


def test_link_in_place_of_a_lock_is_refused(tmp_path: Path) -> None:
    """A link would write our pid into somebody's file."""
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "embedq-npu-0000-00-0b.0.lock").symlink_to(target)

    with pytest.raises(SettingsError, match="cannot be used"):
        acquire(PCI, tmp_path)
    assert target.read_text() == "precious"
