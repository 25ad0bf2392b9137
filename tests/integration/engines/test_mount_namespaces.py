"""Several NPUs in one machine need private mount namespaces, as the error message says.

The processes see a tree with two NPUs in place of /dev/accel and /sys; no NPU is opened.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.redis import DEADLINE_S, environment
from tests.support.sysfs import DeviceTree

from embedq_worker import exit_codes
from embedq_worker.device.discovery import unsupported_platform

pytestmark = pytest.mark.skipif(
    bool(unsupported_platform()), reason="no NPU can work on this platform"
)

FIRST, SECOND = "0000:00:0b.0", "0000:00:0c.0"
#: Shell script: mounts a tree over /dev and /sys, hides device files, and runs a command.
IN_TREE = """
set -e
for each in null zero random urandom; do
    touch "$1/dev/$each"
    mount --bind "/dev/$each" "$1/dev/$each"
done
for each in $2; do mount --bind /dev/null "$1/dev/accel/$each"; done
mount --rbind "$1/dev" /dev
mount --bind "$1/sys" /sys
shift 2
exec "$@"
"""
#: Python script: locks the NPU as a worker does, until stdin is closed.
HOLD = """
import sys
from embedq_worker.device.placement import acquire
from embedq_worker.device.placement import choose_placement
from embedq_worker.settings import WorkerSettings
settings = WorkerSettings.load()
held = acquire(choose_placement(settings).npu.pci, settings.lock_dir, worker=settings.name)
print("held", flush=True)
sys.stdin.read()
"""


@functools.cache
def unshare() -> tuple[str, ...]:
    """Return the command that runs a process in a private mount namespace, or skip."""
    for options in ("--mount", "--map-root-user --mount"):
        command = ("unshare", *options.split())
        if shutil.which("unshare"):
            tried = [*command, "mount", "--bind", "/dev/null", "/dev/zero"]
            if not subprocess.run(tried, capture_output=True, check=False).returncode:
                return command
    pytest.skip("this user may not make mount namespaces (unshare --mount)")


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    found = DeviceTree(tmp_path / "tree")
    found.add(0, FIRST)
    found.add(1, SECOND)
    return found


class Namespace:
    """A private mount namespace in which some device files of a tree are hidden."""

    def __init__(self, tree: DeviceTree, locks: Path, hidden: str = "") -> None:
        self._command = [*unshare(), "sh", "-c", IN_TREE, "sh", str(tree.roots.dev.parent), hidden]
        self._environment = environment(
            EMBEDQ_LOCK_DIR=os.fspath(locks), EMBEDQ_RUNTIME_DIR=os.fspath(locks.parent / "run")
        )

    def worker(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, sys.executable, "-m", "embedq_worker", *arguments],
            env={**self._environment, **settings},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def hold(self) -> subprocess.Popen[str]:
        """Start a process that locks the NPU until its stdin is closed."""
        process = subprocess.Popen(
            [*self._command, sys.executable, "-c", HOLD],
            env={**self._environment, "EMBEDQ_DEVICE": "npu", "EMBEDQ_NAME": "holder"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process


def test_two_npus_without_namespaces_are_refused(tree: DeviceTree, tmp_path: Path) -> None:
    """`start` fails and names the remedy; `devices` lists both NPUs."""
    outside = Namespace(tree, tmp_path / "locks")

    shown = json.loads(outside.worker("devices", "--json").stdout)
    refused = outside.worker("start", "--device", "npu")
    second = outside.worker("start", "--device", "npu", EMBEDQ_NPU_DEVICE_FILE="/dev/accel/accel1")

    assert [(npu["pci"], npu["problem"]) for npu in shown["npus"]] == [(FIRST, ""), (SECOND, "")]
    assert (shown["device"], "one container per NPU" in shown["reason"]) == ("cpu", True)
    assert refused.returncode == second.returncode == exit_codes.DEVICE
    assert "private mount namespace" in refused.stderr
    assert "/dev/accel/accel1 is not the first" in second.stderr


def test_each_namespace_has_its_npu_and_locks_are_shared(tree: DeviceTree, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    locks = tmp_path / "locks"
    of_first = Namespace(tree, locks, hidden="accel1")
    of_second = Namespace(tree, locks, hidden="accel0")

    with of_first.hold() as holder:
        free = json.loads(of_second.worker("devices", "--json").stdout)
        refused = of_first.worker("start", "--device", "npu")
        with of_second.hold() as second:
            locked = json.loads(of_second.worker("devices", "--json").stdout)
            second.communicate()
        holder.communicate()

    assert [(npu["pci"], npu["problem"]) for npu in free["npus"]] == [
        (SECOND, ""),
        (FIRST, "not visible here"),
    ]
    assert (free["device"], free["reason"]) == ("npu", f"Found accel1 NPU 4000 at {SECOND}.")
    assert refused.returncode == exit_codes.DEVICE
    assert f"process {holder.pid} on " in refused.stderr and "(worker holder)" in refused.stderr
    assert locked["npus"][0]["problem"].startswith(f"held by {second.pid} ")
    assert sorted(path.name for path in locks.iterdir()) == [
        f"embedq-npu-{pci.replace(':', '-')}.lock" for pci in (FIRST, SECOND)
    ]
