"""NPUs are found by their address, one is chosen or refused, and each refusal has its mend."""

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


def npu(pci: str = FIRST, node: str = "/dev/accel/accel0") -> Npu:
    """Make an NPU that is nowhere."""
    return Npu(Path(node), pci, IDS["4000"])


@pytest.mark.parametrize("architecture", IDS)
def test_npu_is_found_with_address_and_architecture(tree: DeviceTree, architecture: str) -> None:
    """An NPU is its node, its PCI address and the architecture that its device id means."""
    node = tree.add(0, FIRST, device_id=IDS[architecture])

    [found] = discover(tree.roots).visible

    assert (found.device_file, found.pci, found.driver) == (node, FIRST, "intel_vpu")
    assert found.architecture == architecture
    assert found.describe() == f"accel0 NPU {architecture} at {FIRST}"


def test_unknown_id_is_still_an_npu(tree: DeviceTree) -> None:
    """An NPU newer than this version has no architecture, and is used all the same."""
    tree.add(0, device_id=0x1234)

    found = choose(discover(tree.roots))

    assert (found.architecture, found.describe()) == ("", f"accel0 NPU id 0x1234 at {FIRST}")


def test_accelerators_of_others_are_left_out(tree: DeviceTree) -> None:
    """Gaudi and friends use /dev/accel too."""
    tree.add(0, vendor=0x1DA3)

    assert discover(tree.roots) == NpuInventory()


def test_machine_without_sysfs_has_no_npu(tmp_path: Path) -> None:
    """A missing tree is an empty one."""
    roots = SysfsRoots(dev=tmp_path / "no", sys=tmp_path / "no")

    with pytest.raises(NoDevice, match="enable it in the BIOS"):
        choose(discover(roots))


def test_node_that_a_container_lacks_is_named(tree: DeviceTree) -> None:
    """The kernel shows every NPU in /sys; one without its node was not passed on."""
    node = tree.add(0, device_file=False)

    with pytest.raises(NoDevice, match=f"not visible here.*{node}") as caught:
        choose(discover(tree.roots))

    assert "`devices:" in str(caught.value)


def test_npu_without_a_driver_is_named(tree: DeviceTree) -> None:
    """An NPU on the bus that no driver took asks for the kernel module."""
    tree.add(0, driver=False)

    with pytest.raises(NoDevice, match=f"{FIRST} has no driver. Run: modprobe intel_vpu"):
        choose(discover(tree.roots))


def test_several_npus_are_refused_with_the_recipe(tree: DeviceTree) -> None:
    """A process cannot choose among NPUs, so the message says how to give it one."""
    tree.add(0, FIRST)
    tree.add(1, SECOND)

    with pytest.raises(SeveralDevices, match=r"one container per NPU.*NPU_DEVICE_FILE") as caught:
        choose(discover(tree.roots))

    assert FIRST in str(caught.value) and SECOND in str(caught.value)


def test_named_npu_is_the_one_that_the_driver_opens(tree: DeviceTree) -> None:
    """EMBEDQ_NPU_DEVICE_FILE settles it only for the first, which is what the driver would open."""
    first = tree.add(2, FIRST)
    second = tree.add(10, SECOND)
    machine = discover(tree.roots)

    assert choose(machine, first).pci == FIRST
    with pytest.raises(SeveralDevices, match="is not the first"):
        choose(machine, second)
    with pytest.raises(NoDevice, match="no NPU has the node"):
        choose(machine, Path("/dev/accel/accel7"))


def test_masked_node_is_not_there(tree: DeviceTree, tmp_path: Path) -> None:
    """A mount namespace that hides a node behind /dev/null leaves the other one as the only."""
    tree.add(0, FIRST).unlink()
    (tree.roots.dev / "accel/accel0").symlink_to("/dev/null")
    tree.add(1, SECOND)

    machine = discover(tree.roots)

    assert [found.pci for found in machine.visible] == [SECOND]
    assert [found.pci for found in machine.hidden] == [FIRST]


@pytest.mark.parametrize(
    ("number", "error", "mend"),
    [
        (errno.EACCES, DeviceForbidden, r"usermod -aG .*--group-add \d+.*render"),
        (errno.EPERM, DeviceForbidden, "Pass it with `devices:`"),
        (errno.ENODEV, NoDevice, "modprobe -r intel_vpu"),
    ],
)
def test_device_that_does_not_open_says_the_mend(
    tree: DeviceTree,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    error: type[Exception],
    mend: str,
) -> None:
    """A missing group, a volume in place of a device and a dead device are not the same."""
    tree.add(0)
    found = choose(discover(tree.roots))

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)  # root may open everything

    with pytest.raises(error, match=mend):
        discovery.check_access(found)


def test_device_that_vanishes_is_no_device(tree: DeviceTree) -> None:
    """A node that goes between look and use is an answer, not a traceback."""
    node = tree.add(0)
    found = choose(discover(tree.roots))
    node.unlink()

    with pytest.raises(NoDevice, match="No such file"):
        discovery.check_access(found)


@pytest.mark.parametrize(
    ("system", "machine"), [("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")]
)
def test_platform_without_a_plugin_is_said_so(system: str, machine: str) -> None:
    """ARM and macOS have no NPU plugin: a finding of the review of the daemon embedq comes from."""
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
def test_addresses_are_read_in_both_forms(text: str, address: str) -> None:
    """OpenVINO prints domain and bus in decimal and the device in hex; the kernel all in hex."""
    assert pci_address(text) == address


def test_opened_device_must_be_the_claimed_one() -> None:
    """The lock of one device is no right to compute on another."""
    verify_opened(npu(), "{domain: 0 bus: 0 device: 0xb function: 0}")

    with pytest.raises(WrongDevice, match="this worker holds accel0 NPU 4000"):
        verify_opened(npu(), "{domain: 1 bus: 3 device: 0x1f function: 7}")
    with pytest.raises(WrongDevice, match="no address"):
        verify_opened(npu(), "")
