"""Tests of invalid and contradictory settings of a worker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from embedq.errors import SettingsError
from embedq_worker.files import private_dir
from embedq_worker.settings import WorkerSettings


@pytest.mark.parametrize(
    ("variable", "typo", "meant"),
    [
        ("DEVICE", "nup", "npu"),
        ("ENGINE", "openvio", "openvino"),
        ("PRECISION", "bf61", "bf16"),
        ("NPU_COMMANDLIST_MODE", "DEFALT", "DEFAULT"),
        ("LOG_LEVEL", "warn", "warning"),
    ],
)
def test_unknown_value_is_refused_with_the_valid_values(
    variable: str, typo: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"EMBEDQ_{variable}", typo)

    with pytest.raises(SettingsError) as caught:
        WorkerSettings.load()

    [line] = str(caught.value).splitlines()
    assert line.startswith(f"EMBEDQ_{variable}: Input should be ")
    assert f"'{meant}'" in line
    assert line.endswith(f", got {typo}.")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strict": True, "device": "cpu"}, "EMBEDQ_STRICT and EMBEDQ_DEVICE=cpu"),
        ({"strict": True, "device": "stub"}, "EMBEDQ_STRICT and EMBEDQ_DEVICE=stub"),
        ({"device": "npu", "engine": "onnxruntime"}, "only openvino drives an NPU"),
        ({"device": "npu", "precision": "f32"}, "an NPU computes in f16"),
        ({"device": "cpu", "precision": "f16"}, "a CPU computes in f32 or bf16"),
        ({"engine": "onnxruntime", "precision": "bf16"}, "onnxruntime computes in f32"),
    ],
)
def test_contradictory_settings_are_refused_with_both_names(
    given: dict[str, object], words: str
) -> None:
    with pytest.raises(SettingsError, match="exclude each other") as caught:
        WorkerSettings.load(**given)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"strict": True},
        {"strict": True, "device": "stub", "stub_device": "npu"},
        {"threads": 512},
        {"visibility_timeout_s": 4},
    ],
)
def test_consistent_settings_are_accepted(given: dict[str, object]) -> None:
    WorkerSettings.load(**given)


def test_default_name_ends_with_the_device() -> None:
    names = {device: WorkerSettings.load(device=device).name for device in ("cpu", "npu", "stub")}

    assert all(name.endswith(f"-{device}") for device, name in names.items())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_runtime_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 12345, 12345)

    with pytest.raises(SettingsError, match="not a folder of this user"):
        private_dir(tmp_path)
