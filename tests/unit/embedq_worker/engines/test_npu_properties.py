"""Tests of the properties sent to the NPU plugin."""

from __future__ import annotations

import pytest

from embedq.errors import SettingsError
from embedq.protocol.contract import Precision
from embedq_worker.engines.openvino_npu import npu_properties, precision_of
from embedq_worker.engines.openvino_runtime import CPU, TARGETS
from embedq_worker.settings import WorkerSettings

#: Some of the properties that the plugin of OpenVINO 2026.4.1 supports.
KNOWN = {"PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT", "NPU_TURBO"}


def test_defaults_are_throughput_and_f16() -> None:
    applied, ignored = npu_properties(KNOWN, {})

    assert applied == {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f16"}
    assert ignored == {}


def test_unknown_property_is_not_sent_and_listed_as_ignored() -> None:
    applied, ignored = npu_properties(KNOWN, {"NPU_TURBO": "YES", "FOO": "1"}, "DEFAULT")

    assert applied["NPU_TURBO"] == "YES"
    assert ignored == {"FOO": "1", "NPU_COMMANDLIST_MODE": "DEFAULT"}


def test_commandlist_mode_is_sent_to_a_plugin_that_supports_it() -> None:
    mode = "FORCE_COMMANDLIST_RECORDING_ONLY"

    applied, ignored = npu_properties({*KNOWN, "NPU_COMMANDLIST_MODE"}, {}, mode)

    assert applied["NPU_COMMANDLIST_MODE"] == mode
    assert ignored == {}


def test_setting_overrides_default_property() -> None:
    applied, _ = npu_properties(KNOWN, {"PERFORMANCE_HINT": "LATENCY"})

    assert applied["PERFORMANCE_HINT"] == "LATENCY"


def test_precision_is_read_from_the_compiled_model() -> None:
    assert precision_of("bf16") is Precision.BF16
    assert precision_of("") is Precision.F16
    assert precision_of("dynamic") is Precision.F16


def test_targets_are_physical_devices() -> None:
    # AUTO, MULTI and HETERO silently compute on another device.
    for target in (CPU, *TARGETS.values()):
        assert target.device in ("NPU", "CPU", "NPUCPU")


@pytest.mark.parametrize("text", ["NPU_TURBO=YES, FOO=a=b", '{"NPU_TURBO": "YES", "FOO": "a=b"}'])
def test_properties_may_be_pairs_or_json(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_NPU_PROPERTIES", text)

    assert WorkerSettings.load().npu_properties == {"NPU_TURBO": "YES", "FOO": "a=b"}


@pytest.mark.parametrize("text", ["NPU_TURBO", "=1", '{"a":'])
def test_malformed_properties_are_refused_with_the_variable(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDQ_NPU_PROPERTIES", text)

    with pytest.raises(SettingsError, match="EMBEDQ_NPU_PROPERTIES"):
        WorkerSettings.load()


def test_npu_emulation_on_a_cpu_worker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDQ_NPU_EMULATION", "alias")
    monkeypatch.setenv("EMBEDQ_DEVICE", "cpu")

    with pytest.raises(SettingsError, match="EMBEDQ_NPU_EMULATION"):
        WorkerSettings.load()
