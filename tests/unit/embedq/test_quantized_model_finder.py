"""Tests of how an int8 job finds the quantized model of the fleet."""

from __future__ import annotations

import pytest

from embedq import Client
from embedq.discovery import QuantizedModelFinder
from embedq.errors import NotQuantized, SettingsError
from embedq.protocol.contract import Accuracy, VectorSpec
from embedq.protocol.worker import ModelInfo, WorkerState, WorkerStatus
from embedq.testing import stub_vectors

MODEL_INFO = ModelInfo("m", "ab" * 32, 8, 16)


def worker(name: str, quantized: str = "", state: str = "healthy") -> WorkerStatus:
    model_info = ModelInfo("m", "ab" * 32, 8, 16, quantized=quantized)
    return WorkerStatus(name, WorkerState(state), state_since=0, model_info=model_info)


def test_workers_without_a_quantized_model_are_ignored() -> None:
    finder = QuantizedModelFinder(MODEL_INFO, wait_s=0)

    assert finder.find([worker("a"), worker("b", "first"), worker("c", "first")]) == "first"


def test_two_quantized_models_are_refused_by_name() -> None:
    with pytest.raises(NotQuantized, match="first, second"):
        QuantizedModelFinder(MODEL_INFO, wait_s=60).find(
            [worker("a", "second"), worker("b", "first")]
        )


def test_running_fleet_without_a_quantized_model_is_refused_at_once() -> None:
    with pytest.raises(NotQuantized, match="embedq-worker quantize FILE"):
        QuantizedModelFinder(MODEL_INFO, wait_s=60).find([worker("a")])


def test_starting_worker_extends_the_wait_until_the_timeout() -> None:
    heartbeats = [worker("a"), worker("b", state="starting")]

    assert QuantizedModelFinder(MODEL_INFO, wait_s=60).find(heartbeats) == ""
    with pytest.raises(NotQuantized):
        QuantizedModelFinder(MODEL_INFO, wait_s=0).find(heartbeats)


def test_quantized_model_is_part_of_the_fingerprint() -> None:
    spec = VectorSpec("ab" * 32, 8, 16, accuracy=Accuracy.INT8, quantized="first")

    assert spec.fingerprint() != spec._replace(quantized="second").fingerprint()


def test_int8_job_is_computed_by_a_worker_with_a_quantized_model(client: Client) -> None:
    vectors = client.encode(["a text"], accuracy="int8")

    assert (vectors == stub_vectors(["a text"])).all()
    assert client.spec(accuracy="int8").quantized == "stub"


def test_strict_and_int8_exclude_each_other(client: Client) -> None:
    with pytest.raises(SettingsError, match="strict and accuracy=int8 exclude each other"):
        client.encode(["a"], strict=True, accuracy="int8")
