"""A worker computes on the NPU if there is one and it may; otherwise it says why not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tests.support.sysfs import DeviceTree

from embedq.protocol.contract import Device
from embedq_worker.device.placement import acquire, choose_placement
from embedq_worker.errors import DeviceBusy, DeviceError, NoDevice, NpuUnproven
from embedq_worker.main_process.start import share_cores
from embedq_worker.settings import WorkerSettings

PCI = "0000:00:0b.0"


@pytest.fixture(autouse=True)
def with_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let openvino be installed, whether it is or not; it is never imported here."""
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(
        "embedq_worker.device.placement.importlib.util.find_spec", lambda name: found
    )


def settings(folder: Path, **given: object) -> WorkerSettings:
    """Return settings of a worker whose locks are in a folder."""
    return WorkerSettings.load(lock_dir=folder / "locks", **given)


def test_auto_takes_the_npu_that_is_there(tree: DeviceTree, tmp_path: Path) -> None:
    """With an NPU, auto is npu; the reason names it and the device can be claimed."""
    tree.add(0)

    placed = choose_placement(settings(tmp_path), roots=tree.roots, system_lacks="")

    assert (placed.device, placed.assigned_device, placed.degraded) == (
        Device.NPU,
        Device.NPU,
        False,
    )
    assert placed.reason == f"Found accel0 NPU 4000 at {PCI}."
    assert placed.npu is not None and placed.npu.pci == PCI


def test_auto_without_an_npu_is_cpu_and_says_why(tree: DeviceTree, tmp_path: Path) -> None:
    """A machine without an NPU is a machine for the CPU, not an error."""
    placed = choose_placement(settings(tmp_path), roots=tree.roots, system_lacks="")

    assert (placed.device, placed.assigned_device) == (Device.CPU, Device.CPU)
    assert placed.reason.startswith("This machine shows no NPU.")


def test_npu_is_refused_where_there_is_none(tree: DeviceTree, tmp_path: Path) -> None:
    """Who asked for an NPU by name is not given a CPU."""
    with pytest.raises(NoDevice, match="shows no NPU"):
        choose_placement(settings(tmp_path, device="npu"), roots=tree.roots, system_lacks="")
    with pytest.raises(NoDevice, match="shows no NPU"):
        choose_placement(settings(tmp_path, strict=True), roots=tree.roots, system_lacks="")


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_platform_without_a_plugin(device: str, tree: DeviceTree, tmp_path: Path) -> None:
    """On ARM auto is cpu and npu is refused, both with the same sentence."""
    tree.add(0)
    lacks = "OpenVINO has no NPU plugin for this platform (linux, aarch64)."
    asked = settings(tmp_path, device=device)

    try:
        reason = choose_placement(asked, roots=tree.roots, system_lacks=lacks).reason
    except DeviceError as error:
        assert device == "npu"
        reason = str(error)

    assert lacks in reason


def test_missing_openvino_is_said_with_the_extra(
    tree: DeviceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An NPU is opt-in: without its extra a machine that has one computes on its CPU."""
    tree.add(0)
    monkeypatch.setattr(
        "embedq_worker.device.placement.importlib.util.find_spec", lambda name: None
    )

    placed = choose_placement(settings(tmp_path), roots=tree.roots, system_lacks="")

    assert placed.device is Device.CPU
    assert "pip install 'embedq[npu]'" in placed.reason


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_npu_of_another_process(device: str, tree: DeviceTree, tmp_path: Path) -> None:
    """A second worker refuses, or takes the CPU if it may, and both name the holder."""
    tree.add(0)
    asked = settings(tmp_path, device=device)
    with acquire(PCI, asked.lock_dir, worker="first"):
        try:
            reason = choose_placement(asked, roots=tree.roots, system_lacks="").reason
        except DeviceBusy as busy:
            assert device == "npu"
            reason = str(busy)

    assert "is held by process" in reason and "(worker first)" in reason


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_npu_that_failed_leaves_a_degraded_worker(
    device: str, tree: DeviceTree, tmp_path: Path
) -> None:
    """A worker whose NPU cannot be proven stays the NPU's worker, and computes on its CPU."""
    tree.add(0)
    asked = settings(tmp_path, device=device)

    placed = choose_placement(
        asked, npu_disabled_reason="It lied.", roots=tree.roots, system_lacks=""
    )

    assert (placed.device, placed.assigned_device) == (Device.CPU, Device.NPU)
    assert placed.degraded and placed.reason == "It lied."


def test_strict_worker_never_computes_on_its_cpu(tree: DeviceTree, tmp_path: Path) -> None:
    """EMBEDQ_STRICT=1 means the NPU or nothing."""
    tree.add(0)

    with pytest.raises(NpuUnproven, match=r"It lied\. EMBEDQ_STRICT keeps"):
        choose_placement(
            settings(tmp_path, strict=True), npu_disabled_reason="It lied.", roots=tree.roots
        )


def test_crashing_worker_without_an_npu_is_no_degraded_one(
    tree: DeviceTree, tmp_path: Path
) -> None:
    """What has no NPU has nothing to fall back from."""
    placed = choose_placement(
        settings(tmp_path), npu_disabled_reason="It died.", roots=tree.roots, system_lacks=""
    )

    assert not placed.degraded


def test_cpu_asked_for_is_cpu(tree: DeviceTree, tmp_path: Path) -> None:
    """An NPU that nobody asked for is left alone."""
    tree.add(0)

    placed = choose_placement(settings(tmp_path, device="cpu"), roots=tree.roots, system_lacks="")

    assert (placed.device, placed.npu) == (Device.CPU, None)


@pytest.mark.parametrize(
    ("cores", "npu_visible", "shares"),
    [(1, True, (1, 1)), (2, True, (1, 1)), (8, True, (2, 6)), (8, False, (2, 8))],
)
def test_two_workers_share_the_cores(
    cores: int, npu_visible: bool, shares: tuple[int, int]
) -> None:
    """A quarter feeds the NPU, the others compute; without an NPU all of them do."""
    assert shares == tuple(
        share_cores(cores, part, npu_visible=npu_visible) for part in ("npu", "cpu")
    )
