"""Tests of a worker's settings and of their error messages."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from embedq.errors import SettingsError
from embedq_worker.settings import WorkerSettings, default_lock_dir


def test_defaults_need_no_environment() -> None:
    settings = WorkerSettings.load()

    assert settings.name == WorkerSettings.load().name
    assert settings.cores() >= 1


def test_settings_of_the_sdk_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_MAX_IN_FLIGHT", "8")

    WorkerSettings.load()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("DEVICE", "cup", "EMBEDQ_DEVICE: Input should be .*'cpu'.*, got cup."),
        ("LOG_LEVEL", "warn", "EMBEDQ_LOG_LEVEL: Input should be .*'warning'.*, got warn."),
        ("NAME", "a b", "EMBEDQ_NAME: Input should be .* letters, digits.*, got a b."),
        ("NAME", "../x", "EMBEDQ_NAME: .*letters, digits"),
        ("THREADS", "-1", "EMBEDQ_THREADS: Input should be greater than or equal to 0, got -1."),
        ("INIT_TIMEOUT_S", "0", "EMBEDQ_INIT_TIMEOUT_S: Input should be greater than 0, got 0."),
        (
            "NPU_PROPERTIES",
            "TURBO",
            "EMBEDQ_NPU_PROPERTIES: Input should be KEY=VALUE,.* got TURBO",
        ),
        (
            "NPU_PROPERTIES",
            "{oops",
            "Input should be KEY=VALUE,KEY=VALUE, or a JSON object, got {oops",
        ),
        ("DEVISE", "cpu", "EMBEDQ_DEVISE: no such setting. Did you mean EMBEDQ_DEVICE?"),
    ],
)
def test_invalid_setting_is_refused_with_the_variable_and_valid_values(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"EMBEDQ_{name}", value)

    with pytest.raises(SettingsError, match=message):
        WorkerSettings.load()


def test_threads_setting_limits_the_cores() -> None:
    assert WorkerSettings.load(threads=3).cores() == 3


def test_default_lock_folder_does_not_depend_on_tmpdir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/embedq-1-private")
    monkeypatch.setattr(Path, "is_dir", lambda _: False)

    assert default_lock_dir() == Path("/tmp")


@pytest.mark.parametrize("device", ["auto", "cpu", "npu"])
def test_default_name_is_host_and_device_setting(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "rack7.example.org")
    monkeypatch.setenv("EMBEDQ_DEVICE", device)
    monkeypatch.delenv("EMBEDQ_NAME", raising=False)

    assert WorkerSettings.load().name == f"rack7-{device}"
