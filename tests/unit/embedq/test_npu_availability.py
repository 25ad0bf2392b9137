"""Tests of how a strict job waits for an NPU worker."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from embedq import Client
from embedq.discovery import NpuAvailability, can_serve_strict
from embedq.errors import NoWorker, SettingsError, StrictUnavailable
from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq.settings import ProducerSettings


def worker(
    state: str = "healthy", assigned: str = "npu", device: str = "npu", *, will_retry: bool = False
) -> WorkerStatus:
    return WorkerStatus(
        "n",
        WorkerState(state),
        state_since=0,
        assigned_device=assigned,
        device=device,
        reason="Wrong vectors.",
        will_retry=will_retry,
    )


@pytest.mark.parametrize(
    ("heartbeat", "serves"),
    [
        (worker(), True),
        (worker("starting", device=""), True),
        (worker("starting", assigned="", device=""), True),
        (worker("probing", device=""), True),
        (worker("degraded", device="cpu"), False),
        (worker("degraded", device="cpu", will_retry=True), True),
        (worker("failed", device=""), False),
        (worker(assigned="cpu", device="cpu"), False),
        (worker(assigned="", device="cpu"), False),
    ],
)
def test_strict_job_waits_for_workers_with_a_usable_npu(
    heartbeat: WorkerStatus, serves: bool
) -> None:
    assert can_serve_strict(heartbeat) is serves


def test_job_fails_with_the_state_of_the_npu_workers() -> None:
    availability = NpuAvailability(lambda: [worker("degraded", device="cpu")], wait_s=0)
    availability.check()

    with pytest.raises(StrictUnavailable, match=r"Worker n is degraded: Wrong vectors\.") as caught:
        availability.check()

    assert isinstance(caught.value, NoWorker)
    assert "EMBEDQ_STARTUP_TIMEOUT_S" in str(caught.value)


def test_available_npu_restarts_the_wait() -> None:
    availability = NpuAvailability(lambda: [worker("starting", device="")], wait_s=0)

    for _ in range(3):
        availability.check()


def test_redis_outage_does_not_count_as_missing_npu() -> None:
    answers: list[Sequence[WorkerStatus] | Exception] = [[], RedisConnectionError("down"), []]

    def fetch() -> Sequence[WorkerStatus]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    availability = NpuAvailability(fetch, wait_s=0)
    for _ in range(3):
        availability.check()


def test_settings_strict_and_exact_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="EMBEDQ_STRICT and EMBEDQ_ACCURACY=exact"):
        ProducerSettings.load(strict=True, accuracy="exact")


def test_call_options_strict_and_exact_exclude_each_other(client: Client) -> None:
    with pytest.raises(SettingsError, match="strict and accuracy=exact exclude each other"):
        client.encode(["a"], strict=True, accuracy="exact")
