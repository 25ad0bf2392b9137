"""Checks of the NPU for `embedq-worker check` and `devices`: plugin, driver, device file, lock."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from embedq.errors import EmbedqError
from embedq_worker.device.discovery import (
    OLDEST_DRIVER,
    ROOTS,
    Npu,
    SysfsRoots,
    build_date,
    check_access,
    choose,
    discover,
    unsupported_platform,
)
from embedq_worker.device.placement import choose_placement, current_holder
from embedq_worker.settings import DeviceChoice, Emulation, WorkerSettings

#: Library through which the NPU plugin finds the driver.
LOADER: Final = "libze_loader.so.1"
#: User-mode driver, and its name in older releases.
DRIVER, OLD_DRIVER = "libze_intel_npu.so.1", "libze_intel_vpu.so.1"
#: NPU plugin of OpenVINO.
PLUGIN: Final = "libopenvino_intel_npu_plugin.so"
_PACKAGES: Final = "https://github.com/intel/linux-npu-driver/releases"
_NO_NPU: Final = "or start with --device cpu."


class Line(NamedTuple):
    """One check of the NPU.

    Attributes:
        name: what was checked.
        ok: whether the check passed.
        detail: what was found.
        fix: next step; empty if none is needed.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


def wants_npu(settings: WorkerSettings) -> bool:
    """Return whether the settings require an NPU."""
    return settings.device is DeviceChoice.NPU or settings.strict


def lines(
    settings: WorkerSettings,
    *,
    roots: SysfsRoots = ROOTS,
    load: Callable[[str], object] = ctypes.CDLL,
    system_lacks: str | None = None,
) -> Iterator[Line]:
    """Yield the checks of the NPU in the order of dependence.

    A worker that neither requires an NPU nor finds one gets no line.

    Args:
        settings: of the worker.
        roots: folders in which the kernel lists devices.
        load: opens a library, or raises OSError.
        system_lacks: why no NPU can work on this platform; None = detect.
    """
    if settings.device in (DeviceChoice.CPU, DeviceChoice.STUB):
        return
    if settings.npu_emulation is not Emulation.NONE:
        shown = f"EMBEDQ_NPU_EMULATION={settings.npu_emulation}: emulated on the CPU"
        yield Line("npu", True, shown)
        return
    machine = discover(roots)
    if not (wants_npu(settings) or machine.visible or machine.hidden or machine.driverless):
        return
    lacking = unsupported_platform() if system_lacks is None else system_lacks
    yield _plugin(lacking)
    if lacking:
        return
    yield _library("loader", load, LOADER, "Install libze1 (Debian, Ubuntu) or level-zero,")
    yield _driver(load)
    yield from _device(settings, roots)


def _plugin(lacking: str) -> Line:
    if lacking:
        return Line("npu plugin", False, lacking, "Start with --device cpu.")
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        return Line("npu plugin", False, "openvino is missing", "pip install 'embedq[npu]'")
    plugin = Path(spec.submodule_search_locations[0], "libs", PLUGIN)
    if not plugin.exists():
        return Line("npu plugin", False, f"{plugin} is missing", "pip install openvino from PyPI")
    return Line("npu plugin", True, str(plugin))


def _library(name: str, load: Callable[[str], object], library: str, fix: str) -> Line:
    try:
        load(library)
    except OSError as error:
        return Line(name, False, str(error), f"{fix} {_NO_NPU}")
    return Line(name, True, library)


def _driver(load: Callable[[str], object]) -> Line:
    new = _library("driver", load, DRIVER, f"Install intel-level-zero-npu from {_PACKAGES},")
    old = _library("driver", load, OLD_DRIVER, "").ok
    if new.ok and old:
        fix = f"Remove {OLD_DRIVER}, which shadows the new one: find / -name '{OLD_DRIVER}*'"
        return Line("driver", False, f"{DRIVER} and the older {OLD_DRIVER}", fix)
    if old:
        fix = f"It is too old for this OpenVINO. Install intel-level-zero-npu from {_PACKAGES}"
        return Line("driver", False, OLD_DRIVER, fix)
    return new


def driver_age(version: str) -> Iterator[Line]:
    """Yield a check of the driver's build date, unless the version contains none.

    Args:
        version: property `NPU_DRIVER_VERSION` of the plugin; empty for an emulated NPU.
    """
    built = build_date(version)
    if built is None:
        return
    shown = f"built on {built}"
    if built < OLDEST_DRIVER:
        fix = f"Install intel-level-zero-npu and its companion packages from {_PACKAGES}"
        detail = f"{shown}; the oldest known to work is of {OLDEST_DRIVER}"
        yield Line("driver age", False, detail, fix)
    else:
        yield Line("driver age", True, shown)


def _device(settings: WorkerSettings, roots: SysfsRoots) -> Iterator[Line]:
    try:
        npu = choose(discover(roots), settings.npu_device_file)
        check_access(npu)
    except EmbedqError as error:
        yield Line("npu device", False, *split_fix(error))
        return
    found = f"{npu.describe()}, driver {npu.driver or 'unknown'}, can be opened"
    yield Line("npu device", True, found)
    try:
        held = current_holder(npu.pci, settings.lock_dir)
    except EmbedqError as error:
        yield Line("npu lock", False, *split_fix(error))
        return
    fix = "Another process uses the NPU. Stop it, or start this worker with --device cpu."
    yield Line("npu lock", not held, f"held by {held}" if held else "free", fix if held else "")


def split_fix(error: EmbedqError) -> tuple[str, str]:
    """Split a message into its first sentence and the rest, which is the next step."""
    head, _, tail = str(error).partition(". ")
    return (f"{head}.", tail) if tail else (head, "")


class Survey(NamedTuple):
    """The NPUs of a machine, and the device that `start` would choose.

    Attributes:
        npus: for each NPU its device_file, pci, architecture, driver and problem; problem is empty
            if the NPU is usable.
        device: device that `start` would compute on; empty if it would exit with an error.
        reason: reason of the choice or the error.
    """

    npus: tuple[dict[str, str], ...]
    device: str
    reason: str

    def lines(self) -> Iterator[str]:
        """Yield the survey for people."""
        for npu in self.npus:
            name = f"NPU {npu['architecture']}" if npu["architecture"] else "NPU of unknown kind"
            yield f"{npu['device_file']}  {name} at {npu['pci']}  {npu['problem'] or 'usable'}"
        yield f"start would compute on: {self.device or 'nothing'}. {self.reason}"


def survey(settings: WorkerSettings, *, roots: SysfsRoots = ROOTS) -> Survey:
    """Check every NPU, and choose a device as `start` would."""
    machine = discover(roots)
    npus = [_describe(npu, settings) for npu in machine.visible]
    npus += [{**_facts(npu), "problem": "not visible here"} for npu in machine.hidden]
    try:
        placement = choose_placement(settings, roots=roots)
    except EmbedqError as error:
        return Survey(tuple(npus), "", str(error))
    return Survey(tuple(npus), str(placement.device), placement.reason)


def _describe(npu: Npu, settings: WorkerSettings) -> dict[str, str]:
    try:
        check_access(npu)
        held = current_holder(npu.pci, settings.lock_dir)
    except EmbedqError as error:
        return {**_facts(npu), "problem": str(error)}
    return {**_facts(npu), "problem": f"held by {held}" if held else ""}


def _facts(npu: Npu) -> dict[str, str]:
    return {
        "device_file": str(npu.device_file),
        "pci": npu.pci,
        "architecture": npu.architecture,
        "driver": npu.driver,
    }
