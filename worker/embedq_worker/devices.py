"""Which NPU this process may use, and whether it can. Opens nodes; no runtime.

One process can only use the first NPU that it sees.
"""

from __future__ import annotations

import errno
import grp
import os
import platform
import stat
import sys
from pathlib import Path
from typing import Final

from embedq_worker.errors import DeviceForbidden, NoDevice, SeveralDevices, WrongDevice
from embedq_worker.machine import Machine, Npu, pci_address

#: Machines for which OpenVINO has an NPU plugin.
PLUGIN_MACHINES: Final = ("x86_64", "AMD64")

_RECIPE: Final = (
    "A process can only use the first NPU it sees, so run one container per node "
    "(--device /dev/accel/accelN), or one node per private mount namespace with EMBEDQ_NPU_NODE."
)


def no_plugin(system: str = sys.platform, machine: str = "") -> str:
    """Say why no NPU can work on this platform; empty where one can."""
    machine = machine or platform.machine()
    if system == "linux" and machine in PLUGIN_MACHINES:
        return ""
    return f"OpenVINO has no NPU plugin for this platform ({system}, {machine})."


def choose(machine: Machine, named: Path | None = None) -> Npu:
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
    if all(npu.node != named for npu in machine.visible):
        raise NoDevice(f"EMBEDQ_NPU_NODE: no NPU has the node {named}; there is {shown}.")
    if first.node != named:
        raise SeveralDevices(f"EMBEDQ_NPU_NODE: {named} is not the first of {shown}. {_RECIPE}")
    return first


def require_access(npu: Npu) -> None:
    """Open the node as a driver would, and close it.

    Raises:
        DeviceForbidden: this user or container may not.
        NoDevice: the device vanished or does not answer.
    """
    try:
        os.close(os.open(npu.node, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EPERM:  # the cgroup's word; a missing group is EACCES
            raise DeviceForbidden(
                f"{npu.node}: this container may not open it. Pass it with `devices:` or --device; "
                "a volume shows the node and gives no right to it."
            ) from None
        if error.errno == errno.EACCES:
            raise DeviceForbidden(_wrong_group(npu.node)) from None
        raise NoDevice(
            f"{npu.node}: {error.strerror}. Look into dmesg for intel_vpu, then: modprobe -r "
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
            f"The runtime opened the device at {opened_pci or 'no address'}; this node holds "
            f"{claimed.describe()}. {_RECIPE}"
        )


def _why_none(machine: Machine) -> str:
    if machine.hidden:
        shown = ", ".join(npu.describe() for npu in machine.hidden)
        node = machine.hidden[0].node
        return (
            f"The kernel drives {shown}, and the node is not visible here. In a container pass "
            f"it on: `devices: [{node}]` or --device {node}."
        )
    if machine.driverless:
        return (
            f"The NPU at {machine.driverless[0]} has no driver. Run: modprobe intel_vpu (Linux 6.3 "
            "or newer), and look into dmesg for its firmware (package intel-fw-npu)."
        )
    return "This machine shows no NPU. If it has one, enable it in the BIOS (NPU, VPU, AI Boost)."


def _wrong_group(node: Path) -> str:
    found = node.stat()
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:  # a container without the host's groups
        group = str(found.st_gid)
    return (
        f"{node}: no permission; it belongs to group {group} ({stat.filemode(found.st_mode)}). "
        f"Run: usermod -aG {group} $USER and log in anew; in a container add "
        f"--group-add {found.st_gid} (the group is usually `render`)."
    )
