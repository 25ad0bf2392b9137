"""Tests of finding NPUs in sysfs, choosing one and reporting why none can be used."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.support.sysfs import IDS, DeviceTree

from embedq_worker.device import discovery
from embedq_worker.device.discovery import (
    Npu,
    NpuInventory,
    SysfsRoots,
    choose,
    discover,
    pci_address,
    unsupported_platform,
    verify_opened,
)
from embedq_worker.errors import DeviceForbidden, NoDevice, SeveralDevices, WrongDevice

FIRST, SECOND = "0000:00:0b.0", "0001:03:1f.7"


def npu(pci: str = FIRST, device_file: str = "/dev/accel/accel0") -> Npu:
    return Npu(Path(device_file), pci, IDS["4000"])


@pytest.mark.parametrize("architecture", IDS)
def test_npu_is_found_with_device_file_address_and_architecture(
    tree: DeviceTree, architecture: str
) -> None:
    path = tree.add(0, FIRST, device_id=IDS[architecture])

    [found] = discover(tree.roots).visible

    assert (found.device_file, found.pci, found.driver) == (path, FIRST, "intel_vpu")
    assert found.architecture == architecture
    assert found.describe() == f"accel0 NPU {architecture} at {FIRST}"


def test_npu_with_an_unknown_id_is_usable(tree: DeviceTree) -> None:
    tree.add(0, device_id=0x1234)

    found = choose(discover(tree.roots))

    assert (found.architecture, found.describe()) == ("", f"accel0 NPU id 0x1234 at {FIRST}")


def test_accelerators_of_other_vendors_are_ignored(tree: DeviceTree) -> None:
    tree.add(0, vendor=0x1DA3)

    assert discover(tree.roots) == NpuInventory()


def test_machine_without_sysfs_has_no_npu(tmp_path: Path) -> None:
    roots = SysfsRoots(dev=tmp_path / "no", sys=tmp_path / "no")

    with pytest.raises(NoDevice, match="enable it in the BIOS"):
        choose(discover(roots))


def test_npu_without_device_file_in_the_container_is_named(tree: DeviceTree) -> None:
    path = tree.add(0, device_file=False)

    with pytest.raises(NoDevice, match=f"not visible here.*{path}") as caught:
        choose(discover(tree.roots))

    assert "`devices:" in str(caught.value)


def test_npu_without_a_driver_is_refused_with_the_command(tree: DeviceTree) -> None:
    tree.add(0, driver=False)

    with pytest.raises(NoDevice, match=f"{FIRST} has no driver. Run: modprobe intel_vpu"):
        choose(discover(tree.roots))


def test_several_npus_are_refused_with_the_next_step(tree: DeviceTree) -> None:
    tree.add(0, FIRST)
    tree.add(1, SECOND)

    with pytest.raises(SeveralDevices, match=r"one container per NPU.*NPU_DEVICE_FILE") as caught:
        choose(discover(tree.roots))

    assert FIRST in str(caught.value) and SECOND in str(caught.value)


def test_named_device_file_must_be_the_first_npu(tree: DeviceTree) -> None:
    # The driver always opens the first NPU.
    first = tree.add(2, FIRST)
    second = tree.add(10, SECOND)
    machine = discover(tree.roots)

    assert choose(machine, first).pci == FIRST
    with pytest.raises(SeveralDevices, match="is not the first"):
        choose(machine, second)
    with pytest.raises(NoDevice, match="is not the device file of an NPU"):
        choose(machine, Path("/dev/accel/accel7"))


def test_masked_device_file_hides_its_npu(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0, FIRST).unlink()
    (tree.roots.dev / "accel/accel0").symlink_to("/dev/null")
    tree.add(1, SECOND)

    machine = discover(tree.roots)

    assert [found.pci for found in machine.visible] == [SECOND]
    assert [found.pci for found in machine.hidden] == [FIRST]


@pytest.mark.parametrize(
    ("number", "error", "fix"),
    [
        (errno.EACCES, DeviceForbidden, r"usermod -aG .*--group-add \d+.*render"),
        (errno.EPERM, DeviceForbidden, "Pass it with `devices:`"),
        (errno.ENODEV, NoDevice, "modprobe -r intel_vpu"),
    ],
)
def test_device_that_cannot_be_opened_has_the_matching_fix(
    tree: DeviceTree,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[Exception],
    fix: str,
) -> None:
    tree.add(0)
    found = choose(discover(tree.roots))

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)  # root may open everything

    with pytest.raises(error, match=fix):
        discovery.check_access(found)


def test_device_file_that_vanishes_raises_no_device(tree: DeviceTree) -> None:
    path = tree.add(0)
    found = choose(discover(tree.roots))
    path.unlink()

    with pytest.raises(NoDevice, match="No such file"):
        discovery.check_access(found)


@pytest.mark.parametrize(
    ("system", "machine"), [("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")]
)
def test_arm_and_macos_have_no_npu_plugin(system: str, machine: str) -> None:
    assert unsupported_platform(system, machine) == (
        f"OpenVINO has no NPU plugin for this platform ({system}, {machine})."
    )
    assert unsupported_platform("linux", "x86_64") == ""


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("{domain: 0 bus: 0 device: 0xb function: 0}", FIRST),
        ("{domain: 1 bus: 3 device: 0x1f function: 7}", SECOND),
        (FIRST, FIRST),
        ("0001:03:1F.7\n", SECOND),
        ("", ""),
        ("NPU.0", ""),
    ],
)
def test_pci_address_is_parsed_from_openvino_and_kernel_formats(text: str, address: str) -> None:
    # OpenVINO prints domain and bus in decimal and the device in hex; the kernel prints all in hex.
    assert pci_address(text) == address


def test_opened_device_must_be_the_locked_one() -> None:
    verify_opened(npu(), "{domain: 0 bus: 0 device: 0xb function: 0}")

    with pytest.raises(WrongDevice, match="this worker holds accel0 NPU 4000"):
        verify_opened(npu(), "{domain: 1 bus: 3 device: 0x1f function: 7}")
    with pytest.raises(WrongDevice, match="no address"):
        verify_opened(npu(), "")
