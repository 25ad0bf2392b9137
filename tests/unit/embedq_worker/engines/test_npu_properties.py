"""Only properties that a plugin knows are sent, and the others are shown."""

from __future__ import annotations

import pytest

from embedq.errors import SettingsError
from embedq.protocol.contract import Precision
from embedq_worker.engines.openvino_npu import npu_properties, precision_of
from embedq_worker.engines.openvino_runtime import CPU, TARGETS
from embedq_worker.settings import WorkerSettings

#: What the plugin of OpenVINO 2026.4.1 knows with a device, in part.
KNOWN = {"PERFORMANCE_HINT", "INFERENCE_PRECISION_HINT", "NPU_TURBO"}


def test_defaults_are_throughput_and_f16() -> None:
    """Requests in flight, and the one precision that an NPU has."""
    found = npu_properties(KNOWN, {})

    assert found.applied == {"PERFORMANCE_HINT": "THROUGHPUT", "INFERENCE_PRECISION_HINT": "f16"}
    assert found.ignored == {}


def test_unknown_property_is_ignored_visibly() -> None:
    """A plugin refuses a compile for an unknown key, so it is not sent, and it is shown."""
    found = npu_properties(KNOWN, {"NPU_TURBO": "YES", "FOO": "1"}, "DEFAULT")

    assert found.applied["NPU_TURBO"] == "YES"
    assert found.ignored == {"FOO": "1", "NPU_COMMANDLIST_MODE": "DEFAULT"}
    assert found.details()["ignored"] == "FOO=1 NPU_COMMANDLIST_MODE=DEFAULT"


def test_commandlist_mode_is_sent_to_a_plugin_that_knows_it() -> None:
    """With OpenVINO pull request 35626 in the plugin the mode is applied."""
    found = npu_properties({*KNOWN, "NPU_COMMANDLIST_MODE"}, {}, "FORCE_COMMANDLIST_RECORDING_ONLY")

    assert found.applied["NPU_COMMANDLIST_MODE"] == "FORCE_COMMANDLIST_RECORDING_ONLY"
    assert "ignored" not in found.details()


def test_operator_wins_over_our_defaults() -> None:
    """A property of the setting replaces ours."""
    found = npu_properties(KNOWN, {"PERFORMANCE_HINT": "LATENCY"})

    assert found.applied["PERFORMANCE_HINT"] == "LATENCY"


def test_precision_is_what_the_compiled_model_says() -> None:
    """What a plugin reads back counts; one that says nothing computes in the default."""
    assert precision_of("bf16", Precision.F16) is Precision.BF16
    assert precision_of("", Precision.F16) is Precision.F16
    assert precision_of("dynamic", Precision.F16) is Precision.F16


def test_no_target_is_a_virtual_device() -> None:
    """AUTO, MULTI and HETERO answer from another device without a word; none is ever named."""
    for target in (CPU, *TARGETS.values()):
        assert target.device in ("NPU", "CPU", "NPUCPU")


@pytest.mark.parametrize("text", ["NPU_TURBO=YES, FOO=a=b", '{"NPU_TURBO": "YES", "FOO": "a=b"}'])
def test_map_may_be_pairs_or_json(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EMBEDQ_NPU_PROPERTIES takes both forms."""
    monkeypatch.setenv("EMBEDQ_NPU_PROPERTIES", text)

    assert WorkerSettings.load().npu_properties == {"NPU_TURBO": "YES", "FOO": "a=b"}


@pytest.mark.parametrize("text", ["NPU_TURBO", "=1", '{"a":'])
def test_broken_map_is_refused_with_its_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is neither form says which variable is wrong."""
    monkeypatch.setenv("EMBEDQ_NPU_PROPERTIES", text)

    with pytest.raises(SettingsError, match="EMBEDQ_NPU_PROPERTIES"):
        WorkerSettings.load()


def test_standin_without_an_npu_worker_is_a_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated NPU plays the NPU; on a CPU worker the setting would do nothing."""
    monkeypatch.setenv("EMBEDQ_NPU_EMULATION", "alias")
    monkeypatch.setenv("EMBEDQ_DEVICE", "cpu")

    with pytest.raises(SettingsError, match="EMBEDQ_NPU_EMULATION"):
        WorkerSettings.load()
