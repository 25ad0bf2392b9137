"""Tests of the SDK's settings and of their error messages."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq.errors import SettingsError
from embedq.protocol.contract import Accuracy
from embedq.settings import PREFIX, EnvSettings, ProducerSettings, mask_password
from embedq_worker.settings import WorkerSettings


def test_defaults_need_no_environment() -> None:
    settings = ProducerSettings.load()

    assert settings.broker_url == "redis://127.0.0.1:6379/0"
    assert settings.accuracy is Accuracy.STANDARD


def test_argument_overrides_variable_overrides_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_MAX_IN_FLIGHT", "7")
    monkeypatch.setenv("EMBEDQ_MODEL", "folder")

    settings = ProducerSettings.load(model="other", max_in_flight=None)

    assert (settings.max_in_flight, settings.model) == (7, "other")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EMBEDQ_MODLE", "EMBEDQ_MODEL"),
        ("EMBEDQ_BROKER_URI", "EMBEDQ_BROKER_URL"),
        ("EMBEDQ_RESULT_TTL_S", "EMBEDQ_RESULTS_TTL_S"),
    ],
)
def test_misspelled_variable_names_the_nearest_setting(
    name: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "x")

    with pytest.raises(SettingsError, match=f"{name}: no such setting. Did you mean {meant}"):
        ProducerSettings.load()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCURACY", "exakt", "EMBEDQ_ACCURACY: Input should be .*'exact'.*, got exakt."),
        (
            "RESULTS_TTL_S",
            "1",
            "EMBEDQ_RESULTS_TTL_S: Input should be greater than or equal to 60, got 1.",
        ),
        (
            "MAX_IN_FLIGHT",
            "many",
            "EMBEDQ_MAX_IN_FLIGHT: Input should be a valid integer, .*, got many.",
        ),
        (
            "BATCH_TEXTS",
            "9999",
            "EMBEDQ_BATCH_TEXTS: Input should be less than or equal to 4096, got 9999.",
        ),
        (
            "STARTUP_TIMEOUT_S",
            "soon",
            "EMBEDQ_STARTUP_TIMEOUT_S: Input should be a valid number, .*, got soon.",
        ),
        ("BROKER_URL", "", "EMBEDQ_BROKER_URL: Input should be redis://host:port/db, .*db.$"),
        (
            "BROKER_URL",
            "localhost:6379",
            "EMBEDQ_BROKER_URL: Input should be redis://host:port/db, .*db.$",
        ),
        (
            "BROKER_URL",
            "unix:///a?db=0",
            "EMBEDQ_BROKER_URL: Input should be redis://host:port/db, .*db.$",
        ),
        (
            "RESULTS_URL",
            "redis:/u:secret@h/0",
            "EMBEDQ_RESULTS_URL: Input should be redis://host:port/db, .*db.$",
        ),
    ],
)
def test_invalid_value_names_variable_limit_and_value(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PREFIX + name, value)

    with pytest.raises(SettingsError, match=message):
        ProducerSettings.load()


def test_all_invalid_settings_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_RESULTS_TTL_S", "0")
    monkeypatch.setenv("EMBEDQ_BATCH_TEXTS", "0")

    with pytest.raises(SettingsError) as caught:
        ProducerSettings.load()

    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("own", "others"), [(ProducerSettings, WorkerSettings), (WorkerSettings, ProducerSettings)]
)
def test_settings_of_the_other_package_are_accepted(
    own: type[EnvSettings], others: type[EnvSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripts = {"EMBEDQ_TEST_MODEL", "EMBEDQ_TEST_NPU", "EMBEDQ_VENV"}
    for variable in others.variables() - own.variables() | scripts:
        monkeypatch.setenv(variable, "x")

    own.load()


def test_unknown_variable_that_resembles_no_setting_is_ignored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("EMBEDQ_HOME", "x")

    ProducerSettings.load()


@pytest.mark.parametrize("kind", [ProducerSettings, WorkerSettings])
def test_every_public_setting_is_described(
    kind: type[ProducerSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDQ_BROKER_URL", "redis://me:secret@host:1/0")

    described = list(kind.load().describe())

    assert [one.name for one in described] == [
        PREFIX + name.upper() for name in kind.public_fields()
    ]
    assert all(one.description.endswith(".") for one in described)
    numbers = [one for one in described if one.default.replace(".", "", 1).isdigit()]
    assert all(one.unit for one in numbers), [one.name for one in numbers if not one.unit]
    [broker] = [one for one in described if one.name == "EMBEDQ_BROKER_URL"]
    assert (broker.value, broker.source) == ("redis://me:***@host:1/0", "environment")


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("redis://:secret@host:1/0", "redis://:***@host:1/0"),
        ("rediss://me:p@ss@host/1", "rediss://me:***@host/1"),
        ("redis+socket://:secret@/tmp/redis.sock?db=0", "redis+socket://:***@/tmp/redis.sock?db=0"),
        ("redis://host/0", "redis://host/0"),
        ("plain text", "plain text"),
    ],
)
def test_password_in_a_url_is_masked(url: str, masked: str) -> None:
    assert mask_password(url) == masked


def test_representation_of_settings_shows_no_password() -> None:
    settings = ProducerSettings.load(
        broker_url="redis://:secret@h/0", results_url="redis://:secret@h/1"
    )

    assert "secret" not in f"{settings!r} {settings!s}"


def test_error_about_an_invalid_url_shows_no_password() -> None:
    from embedq.store.connection import open_redis

    with pytest.raises(SettingsError) as caught:
        open_redis("redsi://me:secret@host/0")

    assert "secret" not in str(caught.value)
    assert "redis://host:port/db" in str(caught.value)


def test_variable_overrides_mounted_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq.settings.SECRETS_DIR", tmp_path)
    (tmp_path / "embedq_broker_url").write_text("redis://worker:secret@queue:6379/0\n")
    (tmp_path / "embedq_results_url").write_text("redis://file:6379/0")
    (tmp_path / "grafana_password").write_text("unrelated")
    monkeypatch.setenv("EMBEDQ_RESULTS_URL", "redis://variable:6379/0")

    settings = WorkerSettings.load()

    shown = {each.name: (each.value, each.source) for each in settings.describe()}
    assert settings.broker_url == "redis://worker:secret@queue:6379/0"
    assert shown["EMBEDQ_BROKER_URL"] == ("redis://worker:***@queue:6379/0", "secret")
    assert shown["EMBEDQ_RESULTS_URL"] == ("redis://variable:6379/0", "environment")
