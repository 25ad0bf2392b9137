"""Finds the NPUs of a machine in sysfs, chooses one and checks that it can be opened.

An NPU is identified by its PCI address: `accelN` may change at a boot, and `DEVICE_UUID` is the
same on every machine. A process can use only the first NPU that it sees. No runtime enters here.
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

#: PCI vendor id of Intel.
INTEL: Final = 0x8086

#: PCI device id -> architecture as OpenVINO's plugin names it.
ARCHITECTURES: Final = {
    0x7D1D: "3720",  # Meteor Lake
    0xAD1D: "3720",  # Arrow Lake
    0x643E: "4000",  # Lunar Lake
    0xB03E: "5010",  # Panther Lake
    0xFD3E: "5020",  # Wildcat Lake
}

#: Build date of the oldest driver known to work. Older ones carry the library libze_intel_vpu:
#: 1.13.0 of 2025-01-31 was the last, 1.16.0 of 2025-03-28 the first with the new name
#: (linux-npu-driver issue 107).
OLDEST_DRIVER: Final = date(2025, 3, 1)

#: Smallest driver version that is a build time, seconds since 1970; on Windows it is not a time.
MIN_BUILD_TIME_S: Final = 1_500_000_000

_ONE_PER_NPU: Final = (
    "A process can only use the first NPU it sees, so run one container per NPU "
    "(--device /dev/accel/accelN), or one worker per private mount namespace with "
    "EMBEDQ_NPU_DEVICE_FILE."
)
_ADDRESS = re.compile(r"([0-9a-fA-F]{4,}):([0-9a-fA-F]{2}):([0-9a-fA-F]{2})\.([0-7])")
_OPENVINO = re.compile(r"\{domain: (\d+) bus: (\d+) device: 0x([0-9a-fA-F]+) function: (\d+)\}")


@dataclass(frozen=True, slots=True)
class SysfsRoots:
    """Folders in which the kernel lists devices; tests build their own."""

    dev: Path = Path("/dev")
    sys: Path = Path("/sys")


#: The folders of this machine.
ROOTS: Final = SysfsRoots()


@dataclass(frozen=True, slots=True)
class Npu:
    """One NPU.

    Attributes:
        device_file: for example `/dev/accel/accel0`.
        pci: PCI address, for example `0000:00:0b.0`.
        device_id: PCI device id.
        driver: name of the kernel driver.
    """

    device_file: Path
    pci: str
    device_id: int
    driver: str = ""

    @property
    def architecture(self) -> str:
        """Return the architecture as OpenVINO names it; empty if the device id is unknown."""
        return ARCHITECTURES.get(self.device_id, "")

    def describe(self) -> str:
        """Return device file, architecture and address for logs and messages."""
        kind = self.architecture or f"id {self.device_id:#06x}"
        return f"{self.device_file.name} NPU {kind} at {self.pci}"


@dataclass(frozen=True, slots=True)
class NpuInventory:
    """The NPUs of a machine.

    Attributes:
        visible: NPUs with a device file in this process, by number.
        hidden: NPUs with a driver but without a device file here, as in a container.
        driverless: PCI addresses of NPUs without a driver.
    """

    visible: tuple[Npu, ...] = ()
    hidden: tuple[Npu, ...] = ()
    driverless: tuple[str, ...] = ()


def discover(roots: SysfsRoots = ROOTS) -> NpuInventory:
    """List the Intel NPUs of this machine, without other accelerators."""
    visible: list[Npu] = []
    hidden: list[Npu] = []
    for entry in sorted((roots.sys / "class/accel").glob("*"), key=_number):
        device = (entry / "device").resolve()
        if _hex(device / "vendor") == INTEL:
            driver = (device / "driver").resolve().name if (device / "driver").exists() else ""
            device_file = roots.dev / "accel" / entry.name
            npu = Npu(device_file, pci_address(device.name), _hex(device / "device"), driver)
            (visible if _is_visible(device_file, entry) else hidden).append(npu)
    driverless = _driverless(roots.sys, {npu.pci for npu in (*visible, *hidden)})
    return NpuInventory(tuple(visible), tuple(hidden), tuple(driverless))


def _is_visible(device_file: Path, entry: Path) -> bool:
    # In a container, another file may be mounted over the device file to hide it.
    try:
        found = device_file.stat()
        major, _, minor = (entry / "dev").read_text().strip().partition(":")
    except OSError:
        return device_file.exists()
    return not stat.S_ISCHR(found.st_mode) or found.st_rdev == os.makedev(int(major), int(minor))


def _driverless(sys_root: Path, driven: set[str]) -> Iterator[str]:
    for entry in sorted((sys_root / "bus/pci/devices").glob("*")):
        known = _hex(entry / "device") in ARCHITECTURES and _hex(entry / "vendor") == INTEL
        if known and entry.name not in driven:
            yield entry.name


def _number(entry: Path) -> int:
    digits = entry.name.removeprefix("accel")
    return int(digits) if digits.isdigit() else sys.maxsize


def _hex(path: Path) -> int:
    try:
        return int(path.read_text(), 16)
    except (OSError, ValueError):
        return -1


def choose(machine: NpuInventory, named: Path | None = None) -> Npu:
    """Return the NPU that this process can use.

    Args:
        machine: NPUs of this machine.
        named: device file that the operator chose; None = the only visible NPU.

    Raises:
        NoDevice: no NPU is visible, or the named one is not.
        SeveralDevices: several NPUs are visible, and none or not the first is named.
    """
    if not machine.visible:
        raise NoDevice(_why_none(machine))
    shown = ", ".join(npu.describe() for npu in machine.visible)
    first = machine.visible[0]
    if named is None:
        if len(machine.visible) > 1:
            raise SeveralDevices(f"Several NPUs are visible: {shown}. {_ONE_PER_NPU}")
        return first
    if all(npu.device_file != named for npu in machine.visible):
        raise NoDevice(
            f"EMBEDQ_NPU_DEVICE_FILE: {named} is not the device file of an NPU; visible: {shown}."
        )
    if first.device_file != named:
        raise SeveralDevices(
            f"EMBEDQ_NPU_DEVICE_FILE: {named} is not the first of {shown}. {_ONE_PER_NPU}"
        )
    return first


def _why_none(machine: NpuInventory) -> str:
    if machine.hidden:
        shown = ", ".join(npu.describe() for npu in machine.hidden)
        device_file = machine.hidden[0].device_file
        return (
            f"The kernel has a driver for {shown}, but its device file is not visible here. "
            f"In a container add `devices: [{device_file}]` or --device {device_file}."
        )
    if machine.driverless:
        return (
            f"The NPU at {machine.driverless[0]} has no driver. Run: modprobe intel_vpu (Linux 6.3 "
            "or newer), and search dmesg for errors of its firmware (package intel-fw-npu)."
        )
    return "This machine shows no NPU. If it has one, enable it in the BIOS (NPU, VPU, AI Boost)."


def check_access(npu: Npu) -> None:
    """Open the device file as a driver would, and close it.

    Raises:
        DeviceForbidden: this user or container has no permission.
        NoDevice: the device disappeared or does not answer.
    """
    path = npu.device_file
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EPERM:  # refused by the cgroup; a missing group is EACCES
            raise DeviceForbidden(
                f"{path}: this container may not open it. Pass it with `devices:` or --device; "
                "a volume makes it visible without access."
            ) from None
        if error.errno == errno.EACCES:
            raise DeviceForbidden(_wrong_group(path)) from None
        raise NoDevice(
            f"{path}: {error.strerror}. Search dmesg for intel_vpu, then run: "
            "modprobe -r intel_vpu; modprobe intel_vpu"
        ) from None


def _wrong_group(device_file: Path) -> str:
    found = device_file.stat()
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:  # a container without the host's groups
        group = str(found.st_gid)
    return (
        f"{device_file}: no permission; it belongs to group {group} "
        f"({stat.filemode(found.st_mode)}). Run: usermod -aG {group} $USER and log in again; "
        f"in a container add --group-add {found.st_gid} (the group is usually `render`)."
    )


def verify_opened(locked: Npu, opened_pci: str) -> None:
    """Verify that the runtime opened the NPU whose lock this process holds.

    Args:
        locked: NPU whose lock this process holds.
        opened_pci: `DEVICE_PCI_INFO` of the opened device, in OpenVINO's or the kernel's form.

    Raises:
        WrongDevice: the addresses differ, or the opened address cannot be parsed.
    """
    if pci_address(opened_pci) != locked.pci:
        raise WrongDevice(
            f"The runtime opened the device at {opened_pci or 'no address'}; this worker holds "
            f"{locked.describe()}. {_ONE_PER_NPU}"
        )


def pci_address(text: str) -> str:
    """Return a PCI address in the kernel's form; empty if the text is not an address."""
    if found := _ADDRESS.fullmatch(text.strip()):
        domain, bus, device, function = (int(part, 16) for part in found.groups())
    elif found := _OPENVINO.fullmatch(text.strip()):
        domain, bus, function = (int(found[group]) for group in (1, 2, 4))
        device = int(found[3], 16)
    else:
        return ""
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function}"


def build_date(version: str) -> date | None:
    """Return the date of a driver's build; None if the version does not contain it.

    Args:
        version: `NPU_DRIVER_VERSION`; on Linux the build time in seconds since 1970.
    """
    if not version.isdecimal() or not MIN_BUILD_TIME_S <= int(version) < 2**32:
        return None
    return datetime.fromtimestamp(int(version), UTC).date()


def unsupported_platform(system: str = sys.platform, machine: str = "") -> str:
    """Return why no NPU can work on this platform; empty if one can."""
    machine = machine or platform.machine()
    if system == "linux" and machine in ("x86_64", "AMD64"):
        return ""
    return f"OpenVINO has no NPU plugin for this platform ({system}, {machine})."
