"""The systemd unit is valid and consistent with the code."""

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
    return re.findall(rf"^{name}=(.*)$", TEXT, re.M)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """The program is replaced by one that is installed here."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is missing; Debian: apt install systemd")
    copy = tmp_path / UNIT.name
    copy.write_text(TEXT.replace("/opt/embedq/bin/embedq-worker", "/bin/true"))

    done = subprocess.run([program, "verify", copy], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


def test_settings_in_unit_and_environment_file_exist() -> None:
    """A worker does not start with an unknown setting."""
    known = ProducerSettings.variables() | WorkerSettings.variables()
    text = TEXT + (UNIT.with_suffix(".env")).read_text(encoding="utf-8")

    assert set(re.findall(r"\b(EMBEDQ_[A-Z_]+)=", text)) <= known


def test_stop_waits_for_a_batch_and_permanent_errors_are_not_restarted() -> None:
    [codes] = values("RestartPreventExitStatus")

    assert values("KillMode") == ["mixed"]
    assert values("TimeoutStopSec") == ["90"]
    assert {int(code) for code in codes.split()} == {
        exit_codes.SETTINGS,
        exit_codes.MODEL,
        exit_codes.DEVICE,
    }


def test_unit_has_the_device_and_few_privileges() -> None:
    assert values("DynamicUser") == ["yes"]
    assert values("SupplementaryGroups") == ["render"]
    assert values("DevicePolicy") == ["closed"]
    assert values("DeviceAllow") == ["char-accel rw"]
    assert values("NoNewPrivileges") == ["yes"]
    assert values("ProtectSystem") == ["strict"]
    assert values("CapabilityBoundingSet") == [""]
