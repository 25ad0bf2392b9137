"""Choose the device and lock it.

One process per device: an exclusive lock, whose file tells who holds it.

The kernel gives a lock back when its holder dies, so nothing here can go stale: a file that names a
dead process is simply free.

On which device a node computes, and why: the one answer that start, check and devices give.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from embedq.errors import SettingsError
from embedq.protocol.contract import Device
from embedq_worker.device.discovery import Npu, Roots, choose, discover, no_plugin, require_access
from embedq_worker.errors import DeviceBusy, DeviceError, NoDevice, NpuUnproven
from embedq_worker.files import wait_for_lock
from embedq_worker.settings import DeviceChoice, Standin, StubDevice, WorkerSettings

_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class Claim:
    """A device held; it is given back by `release` or by the end of this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the device back; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def claim(pci: str, lock_dir: Path, *, node: str = "", wait_s: float = 0.0) -> Claim:
    """Take the device at a PCI address for this process alone.

    Args:
        pci: its address; device numbers differ between host and container, addresses do not.
        lock_dir: folder that all who could use the device see.
        node: name that the holder goes by, for the message of whoever comes second.
        wait_s: how long a predecessor may take to die.

    Raises:
        DeviceBusy: another process holds it; the message names its pid.
        SettingsError: the folder or the file cannot be used.
    """
    path = _shared_dir(lock_dir) / f"embedq-npu-{pci.replace(':', '-')}.lock"
    descriptor = _open(path)
    try:
        wait_for_lock(descriptor, wait_s)
    except TimeoutError:
        holder = os.pread(descriptor, 256, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise DeviceBusy(_busy(pci, holder, path), holder) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()} {node}\n".encode(), 0)
    return Claim(path, descriptor)


def holder(pci: str, lock_dir: Path) -> str:
    """Tell who holds a device, as `pid host node`; empty if nobody does.

    Raises:
        SettingsError: as claim.
    """
    try:
        claim(pci, lock_dir).release()
    except DeviceBusy as busy:
        return busy.holder
    return ""


def _busy(pci: str, holder: str, path: Path) -> str:
    pid, _, rest = holder.partition(" ")
    host, _, node = rest.partition(" ")
    named = f"process {pid} on {host}" + (f" (node {node})" if node else "")
    who = named if pid.isdigit() else "another process"
    return (
        f"The NPU at {pci} is held by {who}; one process can use it at a time. "
        f"Stop that one, or start this node with --device cpu. Lock: {path}"
    )


def _open(path: Path) -> int:
    try:
        # Without O_CREAT first: in a sticky folder Linux refuses it for a file of another user.
        return os.open(path, _FLAGS)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o600)
        if path.parent.stat().st_mode & stat.S_ISVTX:
            os.fchmod(descriptor, 0o666)  # the next user of the device writes its pid here
    except OSError as error:
        raise _unusable(path, error) from None
    return descriptor


def _unusable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"EMBEDQ_LOCK_DIR: {path} cannot be used ({error.strerror}). Name a folder that this user "
        "and all who use the device may write to: install -d -m 1777 FOLDER"
    )


def _shared_dir(path: Path) -> Path:
    """Return the folder of locks if it is ours, or one that root shares with everybody."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise _unusable(path, error) from None
    sticky = bool(found.st_mode & stat.S_ISVTX)
    mine = found.st_uid == os.getuid() and (sticky or not found.st_mode & 0o022)
    if not stat.S_ISDIR(found.st_mode) or not (mine or (found.st_uid == 0 and sticky)):
        raise SettingsError(
            f"EMBEDQ_LOCK_DIR: {path} is neither a private folder of this user nor one that root "
            "shares (mode 1777). Run: install -d -m 1777 FOLDER as root, and name that one."
        )
    return path


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
