"""NPUs from sysfs, access to them, age of the driver.

Which NPU this process may use, and whether it can. Opens nodes; no runtime.

One process can only use the first NPU that it sees.

How old the NPU's user-mode driver is, as it says itself, and whether that is too old. Pure.

The NPUs of this machine, as its kernel shows them to this process. Reads sysfs; no runtime.

An NPU is its PCI address: `accelN` may change at a boot, and `DEVICE_UUID` is the same on every
machine.
"""

from __future__ import annotations

import errno
import grp
import os
import platform
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

from embedq_worker.errors import DeviceForbidden, NoDevice, SeveralDevices, WrongDevice

#: Machines for which OpenVINO has an NPU plugin.
PLUGIN_MACHINES: Final = ("x86_64", "AMD64")


_RECIPE: Final = (
    "A process can only use the first NPU it sees, so run one container per NPU "
    "(--device /dev/accel/accelN), or one node per private mount namespace with "
    "EMBEDQ_NPU_DEVICE_FILE."
)


def unsupported_platform(system: str = sys.platform, machine: str = "") -> str:
    """Say why no NPU can work on this platform; empty where one can."""
    machine = machine or platform.machine()
    if system == "linux" and machine in PLUGIN_MACHINES:
        return ""
    return f"OpenVINO has no NPU plugin for this platform ({system}, {machine})."


def choose(machine: NpuInventory, named: Path | None = None) -> Npu:
    """Return the one NPU that this process can use.

    Args:
        machine: as from discover.
        named: node that the operator chose, where several are visible.

    Raises:
        NoDevice: there is none, or not the named one.
        SeveralDevices: there are several, and the choice is not the process's.
    """
    if not machine.visible:
        raise NoDevice(_why_none(machine))
    shown = ", ".join(npu.describe() for npu in machine.visible)
    first = machine.visible[0]
    if named is None:
        if len(machine.visible) > 1:
            raise SeveralDevices(f"Several NPUs are visible: {shown}. {_RECIPE}")
        return first
    if all(npu.device_file != named for npu in machine.visible):
        raise NoDevice(f"EMBEDQ_NPU_DEVICE_FILE: no NPU has the node {named}; there is {shown}.")
    if first.device_file != named:
        raise SeveralDevices(
            f"EMBEDQ_NPU_DEVICE_FILE: {named} is not the first of {shown}. {_RECIPE}"
        )
    return first


def check_access(npu: Npu) -> None:
    """Open the node as a driver would, and close it.

    Raises:
        DeviceForbidden: this user or container may not.
        NoDevice: the device vanished or does not answer.
    """
    try:
        os.close(os.open(npu.device_file, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EPERM:  # the cgroup's word; a missing group is EACCES
            raise DeviceForbidden(
                f"{npu.device_file}: this container may not open it. Pass it with `devices:` or "
                f"--device; "
                "a volume shows the node and gives no right to it."
            ) from None
        if error.errno == errno.EACCES:
            raise DeviceForbidden(_wrong_group(npu.device_file)) from None
        raise NoDevice(
            f"{npu.device_file}: {error.strerror}. Look into dmesg for intel_vpu, then: modprobe "
            f"-r "
            "intel_vpu; modprobe intel_vpu"
        ) from None


def verify_opened(claimed: Npu, opened_pci: str) -> None:
    """Refuse to compute on another device than the one that this process holds the lock of.

    Args:
        claimed: the device of the lock.
        opened_pci: `DEVICE_PCI_INFO` of the device that the runtime opened, in OpenVINO's form or
            as an address.

    Raises:
        WrongDevice: they differ, or the address cannot be read.
    """
    if pci_address(opened_pci) != claimed.pci:
        raise WrongDevice(
            f"The runtime opened the device at {opened_pci or 'no address'}; this worker holds "
            f"{claimed.describe()}. {_RECIPE}"
        )


def _why_none(machine: NpuInventory) -> str:
    if machine.hidden:
        shown = ", ".join(npu.describe() for npu in machine.hidden)
        device_file = machine.hidden[0].device_file
        return (
            f"The kernel drives {shown}, and the node is not visible here. In a container pass "
            f"it on: `devices: [{device_file}]` or --device {device_file}."
        )
    if machine.driverless:
        return (
            f"The NPU at {machine.driverless[0]} has no driver. Run: modprobe intel_vpu (Linux 6.3 "
            "or newer), and look into dmesg for its firmware (package intel-fw-npu)."
        )
    return "This machine shows no NPU. If it has one, enable it in the BIOS (NPU, VPU, AI Boost)."


def _wrong_group(device_file: Path) -> str:
    found = device_file.stat()
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:  # a container without the host's groups
        group = str(found.st_gid)
    return (
        f"{device_file}: no permission; it belongs to group {group} "
        f"({stat.filemode(found.st_mode)}). "
        f"Run: usermod -aG {group} $USER and log in anew; in a container add "
        f"--group-add {found.st_gid} (the group is usually `render`)."
    )


#: Drivers built before this day carry the old library, libze_intel_vpu: 1.16.0, packed on
#: 2025-03-28, was the first with the new name, and 1.13.0, packed on 2025-01-31, the last before it
#: (names of the packages; the renaming: linux-npu-driver issue 107).
OLDEST: Final = date(2025, 3, 1)


#: A smaller number is no time of a build; the plugin of Windows counts otherwise.
LEAST_EPOCH_S: Final = 1_500_000_000


def build_day(version: str) -> date | None:
    """Read the day of a build from `NPU_DRIVER_VERSION`; None if it does not tell.

    On Linux it is seconds since 1970: 1759485217 is 1.24.0, whose packages say 20251003.
    """
    if not version.isdecimal() or not LEAST_EPOCH_S <= int(version) < 2**32:
        return None
    return datetime.fromtimestamp(int(version), UTC).date()


def is_too_old(version: str) -> bool:
    """Tell whether a driver is older than any that this OpenVINO is known to work with."""
    day = build_day(version)
    return day is not None and day < OLDEST


#: PCI vendor of Intel.
INTEL: Final = 0x8086


#: PCI device id -> architecture in the words of OpenVINO's plugin.
ARCHITECTURES: Final = {
    0x7D1D: "3720",  # Meteor Lake
    0xAD1D: "3720",  # Arrow Lake
    0x643E: "4000",  # Lunar Lake
    0xB03E: "5010",  # Panther Lake
    0xFD3E: "5020",  # Wildcat Lake
}


_ADDRESS = re.compile(r"([0-9a-fA-F]{4,}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")


_OPENVINO = re.compile(r"\{domain: (\d+) bus: (\d+) device: 0x([0-9a-fA-F]+) function: (\d+)\}")


@dataclass(frozen=True, slots=True)
class SysfsRoots:
    """Where the kernel shows devices; tests build trees of their own."""

    dev: Path = Path("/dev")
    sys: Path = Path("/sys")


@dataclass(frozen=True, slots=True)
class Npu:
    """One NPU.

    Attributes:
        node: its file, as `/dev/accel/accel0`.
        pci: its address, as `0000:00:0b.0`.
        device_id: its PCI device id.
        driver: name of the kernel driver.
    """

    device_file: Path
    pci: str
    device_id: int
    driver: str = ""

    @property
    def architecture(self) -> str:
        """The architecture as OpenVINO names it; empty if this version does not know the id."""
        return ARCHITECTURES.get(self.device_id, "")

    def describe(self) -> str:
        """Name it for a line of a log."""
        known = f"NPU {self.architecture}" if self.architecture else f"NPU id {self.device_id:#06x}"
        return f"{self.device_file.name} {known} at {self.pci}"


@dataclass(frozen=True, slots=True)
class NpuInventory:
    """The NPUs as this process sees them.

    Attributes:
        visible: those with a node here, by number.
        hidden: those that the kernel drives and whose node is not here, as in a container.
        driverless: PCI addresses of those that no driver has taken.
    """

    visible: tuple[Npu, ...] = ()
    hidden: tuple[Npu, ...] = ()
    driverless: tuple[str, ...] = ()


def discover(roots: SysfsRoots = SysfsRoots()) -> NpuInventory:  # frozen
    """Look at all accelerators; those that are not Intel's NPUs are left out."""
    visible: list[Npu] = []
    hidden: list[Npu] = []
    for entry in sorted(_entries(roots.sys / "class/accel"), key=_number):
        npu = _npu(entry, roots)
        if npu is not None:
            (visible if _has_device_file(npu.device_file, entry) else hidden).append(npu)
    driven = {npu.pci for npu in (*visible, *hidden)}
    return NpuInventory(tuple(visible), tuple(hidden), tuple(_driverless(roots.sys, driven)))


def pci_address(text: str) -> str:
    """Return an address in the kernel's form, or an empty string if it is none."""
    if found := _ADDRESS.fullmatch(text.strip()):
        domain, bus, device, function = (int(part, 16) for part in found.groups())
    elif found := _OPENVINO.fullmatch(text.strip()):
        domain, bus, function = (int(found[group]) for group in (1, 2, 4))
        device = int(found[3], 16)
    else:
        return ""
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def _npu(entry: Path, roots: SysfsRoots) -> Npu | None:
    device = (entry / "device").resolve()
    if _hex(device / "vendor") != INTEL:
        return None
    driver = (device / "driver").resolve().name if (device / "driver").exists() else ""
    device_file = roots.dev / "accel" / entry.name
    return Npu(device_file, pci_address(device.name), _hex(device / "device"), driver)


def _has_device_file(device_file: Path, entry: Path) -> bool:
    """Tell whether the node is there and is this device: a masked one is some other file."""
    try:
        found = device_file.stat()
        major, _, minor = (entry / "dev").read_text().strip().partition(":")
    except OSError:
        return device_file.exists()
    return not stat.S_ISCHR(found.st_mode) or found.st_rdev == os.makedev(int(major), int(minor))


def _driverless(sys_root: Path, driven: set[str]) -> Iterator[str]:
    for entry in sorted(_entries(sys_root / "bus/pci/devices")):
        known = _hex(entry / "device") in ARCHITECTURES and _hex(entry / "vendor") == INTEL
        if known and entry.name not in driven:
            yield entry.name


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _number(entry: Path) -> int:
    digits = entry.name.removeprefix("accel")
    return int(digits) if digits.isdigit() else sys.maxsize


def _hex(path: Path) -> int:
    try:
        return int(path.read_text(), 16)
    except (OSError, ValueError):
        return -1
