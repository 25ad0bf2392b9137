"""Tests of the NPU lines of `embedq-worker check` and of `embedq-worker devices`."""

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
    """Return settings with the lock folder below `folder`."""
    return WorkerSettings.load(lock_dir=folder / "locks", **given)


def loader_of(*libraries: str) -> Callable[[str], object]:
    """Return a loader that opens these libraries only."""

    def load(name: str) -> object:
        if name not in libraries:
            raise OSError(f"{name}: cannot open shared object file")
        return object()

    return load


def check_lines(
    tree: DeviceTree, folder: Path, libraries: tuple[str, ...], **given: object
) -> dict[str, Line]:
    """Return the lines that `check` prints about the NPU, by name."""
    worker_settings = settings(folder, **given)
    found = lines(worker_settings, roots=tree.roots, load=loader_of(*libraries), system_lacks="")
    return {line.name: line for line in found}


def test_cpu_only_machine_has_no_npu_lines(tree: DeviceTree, tmp_path: Path) -> None:
    assert check_lines(tree, tmp_path, ()) == {}
    tree.add(0)
    assert check_lines(tree, tmp_path, (), device="cpu") == {}


def test_usable_npu_has_a_line_for_each_part(tree: DeviceTree, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    tree.add(0)

    found = check_lines(tree, tmp_path, (LOADER, DRIVER))

    assert list(found) == ["npu plugin", "loader", "driver", "npu device", "npu lock"]
    assert all(line.ok and not line.fix for line in found.values()), found
    assert "NPU 4000" in found["npu device"].detail


@pytest.mark.parametrize(
    ("libraries", "name", "fix"),
    [
        ((DRIVER,), "loader", "Install libze1"),
        ((LOADER,), "driver", "Install intel-level-zero-npu"),
        ((LOADER, OLD_DRIVER), "driver", "too old for this OpenVINO"),
        ((LOADER, DRIVER, OLD_DRIVER), "driver", "shadows the new one"),
    ],
)
def test_missing_or_old_library_names_the_package(
    tree: DeviceTree, tmp_path: Path, libraries: tuple[str, ...], name: str, fix: str
) -> None:
    tree.add(0)

    line = check_lines(tree, tmp_path, libraries)[name]

    assert not line.ok
    assert fix in line.fix


@pytest.mark.parametrize(
    ("version", "shown", "ok"),
    [
        ("1759485217", ["built on 2025-10-03"], True),  # 1.24.0.20251003
        ("1738281600", ["built on 2025-01-31"], False),  # 1.13.0.20250131
        ("", [], True),
        ("2565", [], True),
    ],
)
def test_driver_version_shows_its_build_date(version: str, shown: list[str], ok: bool) -> None:
    # The plugin reports a driver's build time as its version; emulated NPUs report none.
    found = list(driver_age(version))

    assert [line.detail.partition(";")[0] for line in found] == shown
    assert all(line.ok is ok and bool(line.fix) is not ok for line in found)


def test_every_failed_line_has_a_next_step(tree: DeviceTree, tmp_path: Path) -> None:
    found = check_lines(tree, tmp_path, (), device="npu")

    assert not found["npu device"].ok
    assert all(line.fix for line in found.values() if not line.ok)


def test_platform_without_a_plugin_has_one_line(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0)
    lacks = "OpenVINO has no NPU plugin for this platform (linux, aarch64)."

    found = list(lines(settings(tmp_path), roots=tree.roots, load=loader_of(), system_lacks=lacks))

    assert found == [Line("npu plugin", False, lacks, "Start with --device cpu.")]


def test_missing_plugin_is_reported_with_the_extra(
    tree: DeviceTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree.add(0)
    monkeypatch.setattr(check_npu, "PLUGIN", "libnothing.so")
    assert "missing" in check_lines(tree, tmp_path, ())["npu plugin"].detail

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check_lines(tree, tmp_path, ())["npu plugin"].fix == "pip install 'embedq[npu]'"


def test_lock_line_names_the_holder(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0)
    with acquire(PCI, tmp_path / "locks", worker="busy"):
        line = check_lines(tree, tmp_path, (LOADER, DRIVER))["npu lock"]

    assert not line.ok
    assert line.detail.startswith("held by ") and line.detail.endswith(" busy")


def test_survey_lists_all_npus_and_the_chosen_device(tree: DeviceTree, tmp_path: Path) -> None:
    tree.add(0)
    tree.add(1, "0000:00:0c.0", device_file=False)

    found = survey(settings(tmp_path, device="cpu"), roots=tree.roots)

    assert [npu["problem"] for npu in found.npus] == ["", "not visible here"]
    assert found.device == "cpu"
    assert next(found.lines()).endswith(f"NPU 4000 at {PCI}  usable")
    assert found.reason == "EMBEDQ_DEVICE=cpu"


def test_survey_shows_why_start_would_fail(tree: DeviceTree, tmp_path: Path) -> None:
    found = survey(settings(tmp_path, device="npu"), roots=tree.roots)

    assert found.device == ""
    assert list(found.lines())[-1].startswith("start would compute on: nothing. ")
