"""embedq-worker devices.

The lines of `check` and `devices` about the NPU: everything between plugin and lock.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, NamedTuple

from embedq.errors import EmbedqError
from embedq_worker.device.discovery import (
    OLDEST,
    Npu,
    SysfsRoots,
    build_day,
    check_access,
    choose,
    discover,
    is_too_old,
    unsupported_platform,
)
from embedq_worker.device.placement import choose_placement, current_holder
from embedq_worker.settings import DeviceChoice, Emulation, WorkerSettings

#: Opens what the NPU plugin opens; the name of the second changed with the driver's releases.
LOADER: Final = "libze_loader.so.1"


DRIVER: Final = "libze_intel_npu.so.1"


OLD_DRIVER: Final = "libze_intel_vpu.so.1"


PLUGIN: Final = "libopenvino_intel_npu_plugin.so"


_PACKAGES: Final = "https://github.com/intel/linux-npu-driver/releases"


_NO_NPU: Final = "or start with --device cpu."


class Line(NamedTuple):
    """One finding.

    Attributes:
        name: what was looked at.
        ok: whether an NPU can work as far as this goes.
        detail: what was found.
        mend: the next step, where one is due.
    """

    name: str
    ok: bool
    detail: str
    fix: str = ""


def wants_npu(settings: WorkerSettings) -> bool:
    """Tell whether a missing NPU is an error of this machine."""
    return settings.device is DeviceChoice.NPU or settings.strict


def lines(
    settings: WorkerSettings,
    *,
    roots: SysfsRoots = SysfsRoots(),  # noqa: B008 # frozen
    load: Callable[[str], object] = ctypes.CDLL,
    system_lacks: str | None = None,
) -> Iterator[Line]:
    """Yield what stands between this worker and an NPU, each line before those that depend on it.

    Args:
        settings: of the worker; one on the CPU that no NPU surrounds gets no line.
        roots: where the kernel shows devices.
        load: opens a library, or raises OSError.
        system_lacks: why no NPU can work here; None finds out.
    """
    if settings.device in (DeviceChoice.CPU, DeviceChoice.STUB):
        return
    if settings.npu_emulation is not Emulation.NONE:
        shown = f"EMBEDQ_NPU_EMULATION={settings.npu_emulation}: no NPU, a rehearsal on the CPU"
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
    yield from _worker(settings, roots)


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
    """Look for the user-mode driver; an old one lying around shadows a new one."""
    new = _library("driver", load, DRIVER, f"Install intel-level-zero-npu from {_PACKAGES},")
    old = _library("driver", load, OLD_DRIVER, "").ok
    if new.ok and old:
        mend = f"Remove it, for it shadows the new one: find / -name '{OLD_DRIVER}*'"
        return Line("driver", False, f"{DRIVER} and the older {OLD_DRIVER}", mend)
    if old:
        mend = f"It is too old for this OpenVINO: install intel-level-zero-npu from {_PACKAGES}"
        return Line("driver", False, OLD_DRIVER, mend)
    return new


def driver_age(version: str) -> Iterator[Line]:
    """Yield a line about the age of the driver that has opened the NPU, if it tells its own.

    Args:
        version: what the plugin says, `NPU_DRIVER_VERSION`; empty on an emulated NPU.
    """
    day = build_day(version)
    if day is None:
        return
    shown = f"built on {day}"
    if is_too_old(version):
        mend = f"Install intel-level-zero-npu and its companions from {_PACKAGES}"
        yield Line("driver age", False, f"{shown}; the oldest known to work is of {OLDEST}", mend)
    else:
        yield Line("driver age", True, shown)


def _worker(settings: WorkerSettings, roots: SysfsRoots) -> Iterator[Line]:
    try:
        npu = choose(discover(roots), settings.npu_device_file)
        check_access(npu)
    except EmbedqError as error:
        yield Line("npu node", False, *split_fix(error))
        return
    found = f"{npu.describe()}, driver {npu.driver or 'unknown'}, may be opened"
    yield Line("npu node", True, found)
    try:
        held = current_holder(npu.pci, settings.lock_dir)
    except EmbedqError as error:
        yield Line("npu lock", False, *split_fix(error))
        return
    mend = "That worker computes on it; stop it first, or start this one with --device cpu."
    yield Line("npu lock", not held, f"held by {held}" if held else "free", mend if held else "")


def split_fix(error: EmbedqError) -> tuple[str, str]:
    """Split a message into what happened and what to do, which is all after the first sentence."""
    head, _, tail = str(error).partition(". ")
    return (f"{head}.", tail) if tail else (head, "")


@dataclass(frozen=True, slots=True)
class Survey:
    """The NPUs of a machine and what a worker would do with them.

    Attributes:
        npus: one map for each, with worker, pci, architecture, driver, and why it cannot be used.
        device: what `start` would compute on; empty if it would refuse.
        reason: why.
    """

    npus: tuple[dict[str, str], ...]
    device: str
    reason: str

    def as_dict(self) -> dict[str, object]:
        """Return the survey for JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """Yield the survey for people."""
        for npu in self.npus:
            name = f"NPU {npu['architecture']}" if npu["architecture"] else "NPU of unknown kind"
            yield f"{npu['device_file']}  {name} at {npu['pci']}  {npu['problem'] or 'usable'}"
        yield f"start would compute on: {self.device or 'nothing'}. {self.reason}"


def survey(settings: WorkerSettings, *, roots: SysfsRoots = SysfsRoots()) -> Survey:  # noqa: B008 # frozen
    """Look at every NPU, and choose as `start` would."""
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
