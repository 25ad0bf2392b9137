"""Build trees of /dev and /sys like those of a kernel with NPUs."""

from __future__ import annotations

from pathlib import Path

from embedq_worker.device.discovery import SysfsRoots

#: Architecture as OpenVINO names it -> PCI device id.
IDS = {"3720": 0x7D1D, "4000": 0x643E, "5010": 0xB03E}


class DeviceTree:
    """Trees of /dev and /sys, without an accelerator at first."""

    def __init__(self, folder: Path) -> None:
        self.roots = SysfsRoots(dev=folder / "dev", sys=folder / "sys")
        (self.roots.dev / "accel").mkdir(parents=True)
        (self.roots.sys / "class/accel").mkdir(parents=True)
        (self.roots.sys / "bus/pci/devices").mkdir(parents=True)

    def add(
        self,
        number: int,
        pci: str = "0000:00:0b.0",
        *,
        device_id: int = IDS["4000"],
        vendor: int = 0x8086,
        device_file: bool = True,
        driver: bool = True,
    ) -> Path:
        """Add an accelerator, and return the path of its device file."""
        device = self.roots.sys / "devices" / pci
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor:#06x}\n")
        (device / "device").write_text(f"{device_id:#06x}\n")
        (self.roots.sys / "bus/pci/devices" / pci).symlink_to(device)
        path = self.roots.dev / "accel" / f"accel{number}"
        if not driver:
            return path
        module = self.roots.sys / "bus/pci/drivers/intel_vpu"
        module.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(module)
        entry = self.roots.sys / "class/accel" / path.name
        entry.mkdir()
        (entry / "device").symlink_to(device)
        (entry / "dev").write_text(f"261:{number}\n")
        if device_file:
            path.touch()
        return path
