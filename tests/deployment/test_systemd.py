"""The systemd unit: accepted by systemd, and in step with the code."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.support.deployment import DEPLOY

from embedq.settings import ProducerSettings
from embedq_worker import exit_codes
from embedq_worker.settings import WorkerSettings

UNIT = DEPLOY / "systemd" / "embedq-worker.service"
TEXT = UNIT.read_text(encoding="utf-8")


def values(name: str) -> list[str]:
    """Return all values of a directive."""
    return re.findall(rf"^{name}=(.*)$", TEXT, re.M)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """`systemd-analyze verify` finds nothing, with a program that is there in place of ours."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is missing; Debian: apt install systemd")
    copy = tmp_path / UNIT.name
    copy.write_text(TEXT.replace("/opt/embedq/bin/embedq-worker", "/bin/true"))

    done = subprocess.run([program, "verify", copy], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_settings_in_unit_and_environment_file_exist() -> None:
    """A worker refuses variables that it does not know."""
    known = ProducerSettings.variables() | WorkerSettings.variables()
    text = TEXT + (UNIT.with_suffix(".env")).read_text(encoding="utf-8")

    assert set(re.findall(r"\b(EMBEDQ_[A-Z_]+)=", text)) <= known


def test_ending_fits_a_batch_and_giving_up_is_not_undone() -> None:
    """SIGTERM to the supervisor, 90 s, and no restart after what a restart cannot mend."""
    [codes] = values("RestartPreventExitStatus")

    assert values("KillMode") == ["mixed"]
    assert values("TimeoutStopSec") == ["90"]
    assert {int(code) for code in codes.split()} == {
        exit_codes.SETTINGS,
        exit_codes.MODEL,
        exit_codes.DEVICE,
    }


def test_it_runs_with_the_device_and_little_else() -> None:
    """Not root, the render group, one class of devices, no new privileges, a read-only system."""
    assert values("DynamicUser") == ["yes"]
    assert values("SupplementaryGroups") == ["render"]
    assert values("DevicePolicy") == ["closed"]
    assert values("DeviceAllow") == ["char-accel rw"]
    assert values("NoNewPrivileges") == ["yes"]
    assert values("ProtectSystem") == ["strict"]
    assert values("CapabilityBoundingSet") == [""]
