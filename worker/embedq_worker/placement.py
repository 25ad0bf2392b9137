"""On which device a node computes, and why: the one answer that start, check and devices give."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Final

from embedq.contract import Device
from embedq_worker.choices import DeviceChoice, Standin, StubDevice
from embedq_worker.claims import claim
from embedq_worker.devices import choose, no_plugin, require_access
from embedq_worker.errors import DeviceError, NoDevice, NpuUnproven
from embedq_worker.machine import Npu, Roots, discover
from embedq_worker.settings import WorkerSettings

#: The real trees.
_ROOTS: Final = Roots()


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a node computes.

    Attributes:
        device: what its engine is to run on.
        home: what the node is for; another than `device` while it is degraded.
        reason: why this device; a sentence.
        npu: the NPU to claim, if the engine is to run on it.
    """

    device: Device
    home: Device
    reason: str
    npu: Npu | None = None

    @property
    def degraded(self) -> bool:
        """Whether the node computes on the CPU in place of its NPU."""
        return self.home is Device.NPU and self.device is Device.CPU


def place(
    settings: WorkerSettings,
    *,
    npu_off: str = "",
    wait_s: float = 0.0,
    roots: Roots = _ROOTS,
    system_lacks: str | None = None,
) -> Placement:
    """Choose the device of a node.

    Args:
        settings: what was asked for.
        npu_off: why the NPU must not be tried again, after it failed.
        wait_s: how long a predecessor may take to give the NPU back.
        roots: where the kernel shows devices.
        system_lacks: why no NPU can work here; None finds out.

    Raises:
        DeviceError: an NPU is wanted, and none may be used, or it failed and the node is strict.
    """
    if settings.device is DeviceChoice.STUB:
        home = Device.NPU if settings.stub_device is StubDevice.NPU else Device.STUB
        if npu_off and home is Device.NPU and not settings.strict:
            return Placement(Device.CPU, home, npu_off)
        return Placement(Device.STUB, home, "EMBEDQ_DEVICE=stub")
    if settings.device is DeviceChoice.CPU:
        return Placement(Device.CPU, Device.CPU, "EMBEDQ_DEVICE=cpu")
    if settings.npu_standin is not Standin.NONE and not npu_off:
        return Placement(Device.NPU, Device.NPU, f"EMBEDQ_NPU_STANDIN={settings.npu_standin}")
    if npu_off and settings.strict:
        raise NpuUnproven(f"{npu_off} EMBEDQ_STRICT keeps this node off the CPU.")
    if npu_off and (settings.device is DeviceChoice.NPU or discover(roots).visible):
        return Placement(Device.CPU, Device.NPU, npu_off)
    try:
        npu = find_npu(settings, roots=roots, system_lacks=system_lacks)
        claim(npu.pci, settings.lock_dir, node=settings.name, wait_s=wait_s).release()
    except DeviceError as error:
        if settings.device is DeviceChoice.NPU or settings.strict:
            raise
        return Placement(Device.CPU, Device.CPU, str(error))
    return Placement(Device.NPU, Device.NPU, f"Found {npu.describe()}.", npu)


def find_npu(
    settings: WorkerSettings, *, roots: Roots = _ROOTS, system_lacks: str | None = None
) -> Npu:
    """Return the NPU that this process could use.

    Raises:
        DeviceError: there is none; the message has the mend.
    """
    if lacking := no_plugin() if system_lacks is None else system_lacks:
        raise NoDevice(f"{lacking} Start with --device cpu.")
    npu = choose(discover(roots), settings.npu_node)
    if importlib.util.find_spec("openvino") is None:
        raise NoDevice(
            f"{npu.describe()} needs openvino, which is missing: pip install 'embedq[npu]'"
        )
    require_access(npu)
    return npu
