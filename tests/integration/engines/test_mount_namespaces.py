"""Several NPUs in one machine: the recipe of the refusal, followed with real mount namespaces.

Each process sees a machine of two NPUs in place of /dev/accel and /sys; none of them computes.
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
#: Puts a tree of devices in place of the machine's own, some device files hidden, and runs a
#: command.
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
#: Claims the NPU as a worker does, says so, and holds it until its stdin ends.
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
    """Return the command that gives a process mounts of its own, or skip."""
    for options in ("--mount", "--map-root-user --mount"):
        command = ("unshare", *options.split())
        if shutil.which("unshare"):
            tried = [*command, "mount", "--bind", "/dev/null", "/dev/zero"]
            if not subprocess.run(tried, capture_output=True, check=False).returncode:
                return command
    pytest.skip("this user may not make mount namespaces (unshare --mount)")


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    """A machine with two NPUs."""
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
        """Run embedq-worker in it."""
        return subprocess.run(
            [*self._command, sys.executable, "-m", "embedq_worker", *arguments],
            env={**self._environment, **settings},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def hold(self) -> subprocess.Popen[str]:
        """Start a process that claims the NPU and ends with its stdin."""
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


def test_two_npus_outside_of_containers_are_refused(tree: DeviceTree, tmp_path: Path) -> None:
    """`start` on a machine of two ends with its code and the recipe; `devices` shows both."""
    outside = Namespace(tree, tmp_path / "locks")

    shown = json.loads(outside.worker("devices", "--json").stdout)
    refused = outside.worker("start", "--device", "npu")
    second = outside.worker("start", "--device", "npu", EMBEDQ_NPU_DEVICE_FILE="/dev/accel/accel1")

    assert [(npu["pci"], npu["problem"]) for npu in shown["npus"]] == [(FIRST, ""), (SECOND, "")]
    assert (shown["device"], "one container per NPU" in shown["reason"]) == ("cpu", True)
    assert refused.returncode == second.returncode == exit_codes.DEVICE
    assert "private mount namespace" in refused.stderr
    assert "/dev/accel/accel1 is not the first" in second.stderr


def test_namespaces_part_the_npus_and_share_the_locks(tree: DeviceTree, tmp_path: Path) -> None:
    """With the other device file hidden each has its own NPU, and a third process finds it held."""
    pytest.importorskip("openvino")
    locks = tmp_path / "locks"
    of_first = Namespace(tree, locks, hidden="accel1")
    of_second = Namespace(tree, locks, hidden="accel0")

    with of_first.hold() as holder:
        free = json.loads(of_second.worker("devices", "--json").stdout)
        late = of_first.worker("start", "--device", "npu")
        with of_second.hold() as beside:
            taken = json.loads(of_second.worker("devices", "--json").stdout)
            beside.communicate()
        holder.communicate()

    assert [(npu["pci"], npu["problem"]) for npu in free["npus"]] == [
        (SECOND, ""),
        (FIRST, "not visible here"),
    ]
    assert (free["device"], free["reason"]) == ("npu", f"Found accel1 NPU 4000 at {SECOND}.")
    assert late.returncode == exit_codes.DEVICE
    assert f"process {holder.pid} on " in late.stderr and "(worker holder)" in late.stderr
    assert taken["npus"][0]["problem"].startswith(f"held by {beside.pid} ")
    assert sorted(path.name for path in locks.iterdir()) == [
        f"embedq-npu-{pci.replace(':', '-')}.lock" for pci in (FIRST, SECOND)
    ]
