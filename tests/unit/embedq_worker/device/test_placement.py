"""Tests of where a worker computes: on an NPU, on its CPU or not at all."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tests.support.sysfs import DeviceTree

from embedq.protocol.contract import Device
from embedq_worker.device.placement import acquire, choose_placement
from embedq_worker.errors import DeviceBusy, DeviceError, NoDevice, NpuUnverified
from embedq_worker.main_process.start import share_cores
from embedq_worker.settings import WorkerSettings

PCI = "0000:00:0b.0"


@pytest.fixture(autouse=True)
def with_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make openvino look installed; it is never imported here."""
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(
        "embedq_worker.device.placement.importlib.util.find_spec", lambda name: found
    )


def settings(folder: Path, **given: object) -> WorkerSettings:
    """Return settings with the lock folder below `folder`."""
    return WorkerSettings.load(lock_dir=folder / "locks", **given)


def test_auto_places_the_worker_on_an_available_npu(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0)

    placed = choose_placement(settings(tmp_path), roots=tree.roots, system_lacks="")

    assert (placed.device, placed.assigned_device, placed.degraded) == (
        Device.NPU,
        Device.NPU,
        False,
    )
    assert placed.reason == f"Found accel0 NPU 4000 at {PCI}."
    assert placed.npu is not None and placed.npu.pci == PCI


def test_auto_without_an_npu_places_the_worker_on_the_cpu(tree: DeviceTree, tmp_path: Path) -> None:
    placed = choose_placement(settings(tmp_path), roots=tree.roots, system_lacks="")

    assert (placed.device, placed.assigned_device) == (Device.CPU, Device.CPU)
    assert placed.reason.startswith("This machine shows no NPU.")


def test_npu_or_strict_without_an_npu_is_refused(tree: DeviceTree, tmp_path: Path) -> None:
    with pytest.raises(NoDevice, match="shows no NPU"):
        choose_placement(settings(tmp_path, device="npu"), roots=tree.roots, system_lacks="")
    with pytest.raises(NoDevice, match="shows no NPU"):
        choose_placement(settings(tmp_path, strict=True), roots=tree.roots, system_lacks="")


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_platform_without_a_plugin_is_cpu_for_auto_and_refused_for_npu(
    device: str, tree: DeviceTree, tmp_path: Path
) -> None:
    tree.add(0)
    lacks = "OpenVINO has no NPU plugin for this platform (linux, aarch64)."
    worker_settings = settings(tmp_path, device=device)

    try:
        reason = choose_placement(worker_settings, roots=tree.roots, system_lacks=lacks).reason
    except DeviceError as error:
        assert device == "npu"
        reason = str(error)

    assert lacks in reason


def test_missing_openvino_places_the_worker_on_the_cpu_and_names_the_extra(
    tree: DeviceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add(0)
    monkeypatch.setattr(
        "embedq_worker.device.placement.importlib.util.find_spec", lambda name: None
    )

    placed = choose_placement(settings(tmp_path), roots=tree.roots, system_lacks="")

    assert placed.device is Device.CPU
    assert "pip install 'embedq[npu]'" in placed.reason


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_npu_locked_by_another_process_is_refused_or_replaced_by_the_cpu(
    device: str, tree: DeviceTree, tmp_path: Path
) -> None:
    tree.add(0)
    worker_settings = settings(tmp_path, device=device)
    with acquire(PCI, worker_settings.lock_dir, worker="first"):
        try:
            reason = choose_placement(worker_settings, roots=tree.roots, system_lacks="").reason
        except DeviceBusy as busy:
            assert device == "npu"
            reason = str(busy)

    assert "is held by process" in reason and "(worker first)" in reason


@pytest.mark.parametrize("device", ["npu", "auto"])
def test_disabled_npu_places_a_degraded_worker_on_the_cpu(
    device: str, tree: DeviceTree, tmp_path: Path
) -> None:
    tree.add(0)
    worker_settings = settings(tmp_path, device=device)

    placed = choose_placement(
        worker_settings, npu_disabled_reason="Wrong vectors.", roots=tree.roots, system_lacks=""
    )

    assert (placed.device, placed.assigned_device) == (Device.CPU, Device.NPU)
    assert placed.degraded and placed.reason == "Wrong vectors."


def test_disabled_npu_is_refused_for_a_strict_worker(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0)

    with pytest.raises(NpuUnverified, match=r"Wrong vectors\. EMBEDQ_STRICT keeps"):
        choose_placement(
            settings(tmp_path, strict=True), npu_disabled_reason="Wrong vectors.", roots=tree.roots
        )


def test_disabled_npu_on_a_machine_without_one_is_not_degraded(
    tree: DeviceTree, tmp_path: Path
) -> None:
    placed = choose_placement(
        settings(tmp_path), npu_disabled_reason="Crash loop.", roots=tree.roots, system_lacks=""
    )

    assert not placed.degraded


def test_device_cpu_ignores_an_available_npu(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0)

    placed = choose_placement(settings(tmp_path, device="cpu"), roots=tree.roots, system_lacks="")

    assert (placed.device, placed.npu) == (Device.CPU, None)


@pytest.mark.parametrize(
    ("cores", "npu_visible", "shares"),
    [(1, True, (1, 1)), (2, True, (1, 1)), (8, True, (2, 6)), (8, False, (2, 8))],
)
def test_npu_worker_gets_a_quarter_of_the_cores(
    cores: int, npu_visible: bool, shares: tuple[int, int]
) -> None:
    assert shares == tuple(
        share_cores(cores, part, npu_visible=npu_visible) for part in ("npu", "cpu")
    )
