"""A job of class int8 asks for the one quantized model that the fleet has."""

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
    """Return what a worker says of itself."""
    model_info = ModelInfo("m", "ab" * 32, 8, 16, quantized=quantized)
    return WorkerStatus(name, WorkerState(state), state_since=0, model_info=model_info)


def test_workers_with_a_copy_are_found_among_others() -> None:
    """Workers without one do not matter: they never read the queue of int8."""
    watch = QuantizedModelFinder(MODEL_INFO, wait_s=0)

    assert watch.find([worker("a"), worker("b", "copy"), worker("c", "copy")]) == "copy"


def test_two_copies_never_mix() -> None:
    """Their vectors differ, so the job is refused with the names of both."""
    with pytest.raises(NotQuantized, match="copy, other"):
        QuantizedModelFinder(MODEL_INFO, wait_s=60).find(
            [worker("a", "other"), worker("b", "copy")]
        )


def test_settled_fleet_without_a_copy_is_told_at_once() -> None:
    """Waiting would change nothing; the message says what to run."""
    with pytest.raises(NotQuantized, match="embedq-worker quantize FILE"):
        QuantizedModelFinder(MODEL_INFO, wait_s=60).find([worker("a")])


def test_worker_that_starts_is_waited_for() -> None:
    """It may have a copy, and time is limited."""
    coming = [worker("a"), worker("b", state="starting")]

    assert QuantizedModelFinder(MODEL_INFO, wait_s=60).find(coming) == ""
    with pytest.raises(NotQuantized):
        QuantizedModelFinder(MODEL_INFO, wait_s=0).find(coming)


def test_copy_is_part_of_the_fingerprint() -> None:
    """Vectors of one copy are not taken for those of another."""
    spec = VectorSpec("ab" * 32, 8, 16, accuracy=Accuracy.INT8, quantized="copy")

    assert spec.fingerprint() != spec._replace(quantized="other").fingerprint()


def test_int8_job_travels_on_its_own_queue(client: Client) -> None:
    """The stub announces a copy, so its worker reads that queue too."""
    vectors = client.encode(["a text"], accuracy="int8")

    assert (vectors == stub_vectors(["a text"])).all()
    assert client.spec(accuracy="int8").quantized == "stub"


def test_strict_and_int8_exclude_each_other(client: Client) -> None:
    """Only the CPU computes in int8 here."""
    with pytest.raises(SettingsError, match="strict and accuracy=int8 exclude each other"):
        client.encode(["a"], strict=True, accuracy="int8")
