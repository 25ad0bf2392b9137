"""The NPUs of this machine, as its kernel shows them to this process. Reads sysfs; no runtime.

An NPU is its PCI address: `accelN` may change at a boot, and `DEVICE_UUID` is the same on every
machine.
"""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

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
class Roots:
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

    node: Path
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
        return f"{self.node.name} {known} at {self.pci}"


@dataclass(frozen=True, slots=True)
class Machine:
    """The NPUs as this process sees them.

    Attributes:
        visible: those with a node here, by number.
        hidden: those that the kernel drives and whose node is not here, as in a container.
        driverless: PCI addresses of those that no driver has taken.
    """

    visible: tuple[Npu, ...] = ()
    hidden: tuple[Npu, ...] = ()
    driverless: tuple[str, ...] = ()


def discover(roots: Roots = Roots()) -> Machine:  # frozen
    """Look at all accelerators; those that are not Intel's NPUs are left out."""
    visible: list[Npu] = []
    hidden: list[Npu] = []
    for entry in sorted(_entries(roots.sys / "class/accel"), key=_number):
        npu = _npu(entry, roots)
        if npu is not None:
            (visible if _has_node(npu.node, entry) else hidden).append(npu)
    driven = {npu.pci for npu in (*visible, *hidden)}
    return Machine(tuple(visible), tuple(hidden), tuple(_driverless(roots.sys, driven)))


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


def _npu(entry: Path, roots: Roots) -> Npu | None:
    device = (entry / "device").resolve()
    if _hex(device / "vendor") != INTEL:
        return None
    driver = (device / "driver").resolve().name if (device / "driver").exists() else ""
    node = roots.dev / "accel" / entry.name
    return Npu(node, pci_address(device.name), _hex(device / "device"), driver)


def _has_node(node: Path, entry: Path) -> bool:
    """Tell whether the node is there and is this device: a masked one is some other file."""
    try:
        found = node.stat()
        major, _, minor = (entry / "dev").read_text().strip().partition(":")
    except OSError:
        return node.exists()
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
