"""A strict job waits while an NPU may come, and gives up with the reason when none will."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from redis.exceptions import ConnectionError as Gone

from embedq import Client
from embedq.discovery import NpuAvailability, can_serve_strict
from embedq.errors import NoWorker, SettingsError, StrictUnavailable
from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq.settings import ProducerSettings


def worker(
    state: str = "healthy", home: str = "npu", device: str = "npu", *, may_return: bool = False
) -> WorkerStatus:
    """Return what a worker says of itself."""
    return WorkerStatus(
        "n",
        WorkerState(state),
        state_since=0,
        assigned_device=home,
        device=device,
        reason="It lied.",
        will_retry=may_return,
    )


@pytest.mark.parametrize(
    ("heartbeat", "serves"),
    [
        (worker(), True),
        (worker("starting", device=""), True),
        (worker("starting", home="", device=""), True),
        (worker("probing", device=""), True),
        (worker("degraded", device="cpu"), False),
        (worker("degraded", device="cpu", may_return=True), True),
        (worker("failed", device=""), False),
        (worker(home="cpu", device="cpu"), False),
        (worker(home="", device="cpu"), False),
    ],
)
def test_workers_that_are_worth_waiting_for(heartbeat: WorkerStatus, serves: bool) -> None:
    """An NPU that serves, comes up or will be tried again; never a CPU."""
    assert can_serve_strict(heartbeat) is serves


def test_job_is_given_up_with_the_reason() -> None:
    """The message says what became of the NPUs, and what to do."""
    watch = NpuAvailability(lambda: [worker("degraded", device="cpu")], wait_s=0)
    watch.check()

    with pytest.raises(StrictUnavailable, match=r"Worker n is degraded: It lied\.") as caught:
        watch.check()

    assert isinstance(caught.value, NoWorker)
    assert "EMBEDQ_STARTUP_TIMEOUT_S" in str(caught.value)


def test_job_waits_while_an_npu_may_come() -> None:
    """Each sight of an NPU begins the wait anew."""
    watch = NpuAvailability(lambda: [worker("starting", device="")], wait_s=0)

    for _ in range(3):
        watch.check()


def test_redis_that_is_gone_is_no_missing_npu() -> None:
    """Whoever cannot ask does not know."""
    answers: list[Sequence[WorkerStatus] | Exception] = [[], Gone("down"), []]

    def fetch() -> Sequence[WorkerStatus]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = NpuAvailability(fetch, wait_s=0)
    for _ in range(3):
        watch.check()


def test_strict_and_exact_are_refused_as_settings() -> None:
    """Whoever sets both hears of it before anything is connected."""
    with pytest.raises(SettingsError, match="EMBEDQ_STRICT and EMBEDQ_ACCURACY=exact"):
        ProducerSettings.load(strict=True, accuracy="exact")


def test_strict_and_exact_exclude_each_other(client: Client) -> None:
    """Only the CPU computes in fp32, so nobody could serve such a job."""
    with pytest.raises(SettingsError, match="strict and accuracy=exact exclude each other"):
        client.encode(["a"], strict=True, accuracy="exact")
