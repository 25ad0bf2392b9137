"""Chooses the device of a worker and locks its NPU for one process.

The kernel releases the lock when its process dies, so a stale lock file does not block.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from embedq.errors import SettingsError
from embedq.protocol.contract import Device
from embedq_worker.device.discovery import (
    ROOTS,
    Npu,
    SysfsRoots,
    check_access,
    choose,
    discover,
    unsupported_platform,
)
from embedq_worker.errors import DeviceBusy, DeviceError, NoDevice, NpuUnverified
from embedq_worker.files import wait_for_lock
from embedq_worker.settings import DeviceChoice, Emulation, StubDevice, WorkerSettings

_FLAGS: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class DeviceLock:
    """Exclusive lock of an NPU; it ends with `release` or with this process."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(pci: str, lock_dir: Path, *, worker: str = "", wait_s: float = 0.0) -> DeviceLock:
    """Lock the NPU at a PCI address for this process.

    Args:
        pci: PCI address, which is the same on the host and in containers, unlike device numbers.
        lock_dir: folder shared by all processes that could use the device.
        worker: name of this worker, for the error message of a second process.
        wait_s: timeout for a process that is ending, seconds.

    Raises:
        DeviceBusy: another process holds the lock; the message names its pid.
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
    except OSError as error:  # a file system without locks
        os.close(descriptor)
        raise _unusable(path, error) from None
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()} {worker}\n".encode(), 0)
    return DeviceLock(path, descriptor)


def current_holder(pci: str, lock_dir: Path) -> str:
    """Return the holder of an NPU as `pid host worker`; empty if it is free.

    Raises:
        SettingsError: as for acquire.
    """
    try:
        acquire(pci, lock_dir).release()
    except DeviceBusy as busy:
        return busy.holder
    return ""


def _busy(pci: str, holder: str, path: Path) -> str:
    pid, _, rest = holder.partition(" ")
    host, _, worker = rest.partition(" ")
    named = f"process {pid} on {host}" + (f" (worker {worker})" if worker else "")
    who = named if pid.isdigit() else "another process"
    return (
        f"The NPU at {pci} is held by {who}; one process can use it at a time. "
        f"Stop that process, or start this worker with --device cpu. Lock: {path}"
    )


def _open(path: Path) -> int:
    try:
        with suppress(FileNotFoundError):
            # Without O_CREAT: in a sticky folder Linux refuses it for a file of another user.
            return os.open(path, _FLAGS)
        descriptor = os.open(path, _FLAGS | os.O_CREAT, 0o600)
        if path.parent.stat().st_mode & stat.S_ISVTX:
            os.fchmod(descriptor, 0o666)  # the next process, of another user, writes its pid here
    except OSError as error:
        raise _unusable(path, error) from None
    return descriptor


def _unusable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"EMBEDQ_LOCK_DIR: {path} cannot be used ({error.strerror}). Name a folder that all users "
        "of the device may write to: install -d -m 1777 FOLDER"
    )


def _shared_dir(path: Path) -> Path:
    # Where other users may write, only the sticky bit prevents them from replacing a lock file.
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise _unusable(path, error) from None
    sticky = bool(found.st_mode & stat.S_ISVTX)
    own = found.st_uid == os.getuid() and (sticky or not found.st_mode & 0o022)
    if not stat.S_ISDIR(found.st_mode) or not (own or (found.st_uid == 0 and sticky)):
        raise SettingsError(
            f"EMBEDQ_LOCK_DIR: {path} is neither a private folder of this user nor a folder of "
            "root with mode 1777. Run as root: install -d -m 1777 FOLDER, and name that folder."
        )
    return path


@dataclass(frozen=True, slots=True)
class Placement:
    """Device on which a worker computes.

    Attributes:
        device: device that computes.
        assigned_device: device that the worker is configured for; another one while it is degraded.
        reason: why this device, in one sentence.
        npu: NPU to lock; None if the engine runs on the CPU, the stub or an emulated NPU.
    """

    device: Device
    assigned_device: Device
    reason: str
    npu: Npu | None = None

    @property
    def degraded(self) -> bool:
        """Say whether the worker computes on the CPU instead of its NPU."""
        return self.assigned_device is Device.NPU and self.device is Device.CPU


def choose_placement(
    settings: WorkerSettings,
    *,
    npu_disabled_reason: str = "",
    wait_s: float = 0.0,
    roots: SysfsRoots = ROOTS,
    system_lacks: str | None = None,
) -> Placement:
    """Choose the device of a worker.

    Args:
        settings: worker's settings.
        npu_disabled_reason: why the NPU must not be opened, after it failed; empty if it may.
        wait_s: timeout for a process that is releasing the NPU, seconds.
        roots: folders in which the kernel lists devices.
        system_lacks: why no NPU can work on this platform; None = detect.

    Raises:
        DeviceError: an NPU is required and none may be used, or a strict worker's NPU failed.
    """
    if settings.device is DeviceChoice.STUB:
        assigned = Device.NPU if settings.stub_device is StubDevice.NPU else Device.STUB
        if npu_disabled_reason and assigned is Device.NPU and not settings.strict:
            return Placement(Device.CPU, assigned, npu_disabled_reason)
        return Placement(Device.STUB, assigned, "EMBEDQ_DEVICE=stub")
    if settings.device is DeviceChoice.CPU:
        return Placement(Device.CPU, Device.CPU, "EMBEDQ_DEVICE=cpu")
    if settings.npu_emulation is not Emulation.NONE and not npu_disabled_reason:
        return Placement(Device.NPU, Device.NPU, f"EMBEDQ_NPU_EMULATION={settings.npu_emulation}")
    if npu_disabled_reason and settings.strict:
        raise NpuUnverified(f"{npu_disabled_reason} EMBEDQ_STRICT keeps this worker off the CPU.")
    if npu_disabled_reason and (settings.device is DeviceChoice.NPU or discover(roots).visible):
        return Placement(Device.CPU, Device.NPU, npu_disabled_reason)
    try:
        npu = _find_npu(settings, roots, system_lacks)
        acquire(npu.pci, settings.lock_dir, worker=settings.name, wait_s=wait_s).release()
    except DeviceError as error:
        if settings.device is DeviceChoice.NPU or settings.strict:
            raise
        return Placement(Device.CPU, Device.CPU, str(error))
    return Placement(Device.NPU, Device.NPU, f"Found {npu.describe()}.", npu)


def _find_npu(settings: WorkerSettings, roots: SysfsRoots, system_lacks: str | None) -> Npu:
    if lacking := unsupported_platform() if system_lacks is None else system_lacks:
        raise NoDevice(f"{lacking} Start with --device cpu.")
    npu = choose(discover(roots), settings.npu_device_file)
    if importlib.util.find_spec("openvino") is None:
        raise NoDevice(
            f"{npu.describe()} needs openvino, which is missing: pip install 'embedq[npu]'"
        )
    check_access(npu)
    return npu
