"""`check` and `devices` look at all between plugin and lock, with a next step for each red."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.sysfs import DeviceTree

from embedq_worker.cli import check_npu
from embedq_worker.cli.check_npu import DRIVER, LOADER, OLD_DRIVER, Line, driver_age, lines, survey
from embedq_worker.device.placement import acquire
from embedq_worker.settings import WorkerSettings

PCI = "0000:00:0b.0"


def settings(folder: Path, **given: object) -> WorkerSettings:
    """Return settings of a worker whose locks are in a folder."""
    return WorkerSettings.load(lock_dir=folder / "locks", **given)


def having(*libraries: str) -> Callable[[str], object]:
    """Return what opens these libraries alone."""

    def load(name: str) -> object:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    return load


def look(
    tree: DeviceTree, folder: Path, libraries: tuple[str, ...], **given: object
) -> dict[str, Line]:
    """Return the lines about a machine by name."""
    asked = settings(folder, **given)
    found = lines(asked, roots=tree.roots, load=having(*libraries), system_lacks="")
    return {line.name: line for line in found}


def test_machine_for_the_cpu_has_no_lines(tree: DeviceTree, tmp_path: Path) -> None:
    """Who has no NPU, or does not want it, reads nothing about one."""
    assert look(tree, tmp_path, ()) == {}
    tree.add(0)
    assert look(tree, tmp_path, (), device="cpu") == {}


def test_whole_chain_is_shown(tree: DeviceTree, tmp_path: Path) -> None:
    """Plugin, loader, driver, worker and lock each have a line."""
    pytest.importorskip("openvino")
    tree.add(0)

    found = look(tree, tmp_path, (LOADER, DRIVER))

    assert list(found) == ["npu plugin", "loader", "driver", "npu device", "npu lock"]
    assert all(line.ok and not line.fix for line in found.values()), found
    assert "NPU 4000" in found["npu device"].detail


@pytest.mark.parametrize(
    ("libraries", "name", "mend"),
    [
        ((DRIVER,), "loader", "Install libze1"),
        ((LOADER,), "driver", "Install intel-level-zero-npu"),
        ((LOADER, OLD_DRIVER), "driver", "too old for this OpenVINO"),
        ((LOADER, DRIVER, OLD_DRIVER), "driver", "shadows the new one"),
    ],
)
def test_missing_or_old_library_has_its_package(
    tree: DeviceTree, tmp_path: Path, libraries: tuple[str, ...], name: str, mend: str
) -> None:
    """A driver too old, a stale one beside it and a missing loader are told apart."""
    tree.add(0)

    line = look(tree, tmp_path, libraries)[name]

    assert not line.ok
    assert mend in line.fix


@pytest.mark.parametrize(
    ("version", "shown", "ok"),
    [
        ("1759485217", ["built on 2025-10-03"], True),  # 1.24.0.20251003
        ("1738281600", ["built on 2025-01-31"], False),  # 1.13.0.20250131
        ("", [], True),
        ("2565", [], True),
    ],
)
def test_driver_tells_its_age(version: str, shown: list[str], ok: bool) -> None:
    """The plugin's version of a driver is the time of its build; emulated NPUs tell none."""
    found = list(driver_age(version))

    assert [line.detail.partition(";")[0] for line in found] == shown
    assert all(line.ok is ok and bool(line.fix) is not ok for line in found)


def test_every_red_line_has_a_next_step(tree: DeviceTree, tmp_path: Path) -> None:
    """An operator is never left with a finding alone."""
    found = look(tree, tmp_path, (), device="npu")

    assert not found["npu device"].ok
    assert all(line.fix for line in found.values() if not line.ok)


def test_platform_without_a_plugin_ends_the_look(tree: DeviceTree, tmp_path: Path) -> None:
    """On ARM nothing is searched for: there is no plugin to be found."""
    tree.add(0)
    lacks = "OpenVINO has no NPU plugin for this platform (linux, aarch64)."

    found = list(lines(settings(tmp_path), roots=tree.roots, load=having(), system_lacks=lacks))

    assert found == [Line("npu plugin", False, lacks, "Start with --device cpu.")]


def test_missing_plugin_is_named(
    tree: DeviceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An openvino from elsewhere may come without the plugin."""
    tree.add(0)
    monkeypatch.setattr(check_npu, "PLUGIN", "libnothing.so")
    assert "missing" in look(tree, tmp_path, ())["npu plugin"].detail

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert look(tree, tmp_path, ())["npu plugin"].fix == "pip install 'embedq[npu]'"


def test_held_lock_names_the_holder(tree: DeviceTree, tmp_path: Path) -> None:
    """`check` beside a running worker says which one has the device."""
    tree.add(0)
    with acquire(PCI, tmp_path / "locks", worker="busy"):
        line = look(tree, tmp_path, (LOADER, DRIVER))["npu lock"]

    assert not line.ok
    assert line.detail.startswith("held by ") and line.detail.endswith(" busy")


def test_survey_shows_every_npu_and_the_choice(tree: DeviceTree, tmp_path: Path) -> None:
    """`devices` lists what is there, usable or not, and what start would do with it."""
    tree.add(0)
    tree.add(1, "0000:00:0c.0", device_file=False)

    found = survey(settings(tmp_path, device="cpu"), roots=tree.roots)

    assert [npu["problem"] for npu in found.npus] == ["", "not visible here"]
    assert found.device == "cpu"
    assert next(found.lines()).endswith(f"NPU 4000 at {PCI}  usable")
    assert found.as_dict()["reason"] == "EMBEDQ_DEVICE=cpu"


def test_survey_says_why_start_would_refuse(tree: DeviceTree, tmp_path: Path) -> None:
    """A refusal is an answer too."""
    found = survey(settings(tmp_path, device="npu"), roots=tree.roots)

    assert found.device == ""
    assert list(found.lines())[-1].startswith("start would compute on: nothing. ")
