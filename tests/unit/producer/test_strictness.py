"""A strict job waits while an NPU may come, and gives up with the reason when none will."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from redis.exceptions import ConnectionError as Gone

from embedq import Client
from embedq.discovery import StrictWatch, may_serve_strict
from embedq.errors import NoNode, SettingsError, StrictUnavailable
from embedq.protocol.worker import Heartbeat
from embedq.settings import ProducerSettings


def node(
    state: str = "healthy", home: str = "npu", device: str = "npu", *, may_return: bool = False
) -> Heartbeat:
    """Return what a node says of itself."""
    return Heartbeat(
        "n",
        state,
        at=0,
        since=0,
        pid=1,
        home=home,
        device=device,
        reason="It lied.",
        may_return=may_return,
    )


@pytest.mark.parametrize(
    ("heartbeat", "serves"),
    [
        (node(), True),
        (node("starting", device=""), True),
        (node("starting", home="", device=""), True),
        (node("probing", device=""), True),
        (node("degraded", device="cpu"), False),
        (node("degraded", device="cpu", may_return=True), True),
        (node("failed", device=""), False),
        (node(home="cpu", device="cpu"), False),
        (node(home="", device="cpu"), False),
    ],
)
def test_nodes_that_are_worth_waiting_for(heartbeat: Heartbeat, serves: bool) -> None:
    """An NPU that serves, comes up or will be tried again; never a CPU."""
    assert may_serve_strict(heartbeat) is serves


def test_job_is_given_up_with_the_reason() -> None:
    """The message says what became of the NPUs, and what to do."""
    watch = StrictWatch(lambda: [node("degraded", device="cpu")], wait_s=0)
    watch.look()

    with pytest.raises(StrictUnavailable, match=r"Node n is degraded: It lied\.") as caught:
        watch.look()

    assert isinstance(caught.value, NoNode)
    assert "EMBEDQ_NODE_WAIT_S" in str(caught.value)


def test_job_waits_while_an_npu_may_come() -> None:
    """Each sight of an NPU begins the wait anew."""
    watch = StrictWatch(lambda: [node("starting", device="")], wait_s=0)

    for _ in range(3):
        watch.look()


def test_redis_that_is_gone_is_no_missing_npu() -> None:
    """Whoever cannot ask does not know."""
    answers: list[Sequence[Heartbeat] | Exception] = [[], Gone("down"), []]

    def fetch() -> Sequence[Heartbeat]:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = StrictWatch(fetch, wait_s=0)
    for _ in range(3):
        watch.look()


def test_strict_and_exact_are_refused_as_settings() -> None:
    """Whoever sets both hears of it before anything is connected."""
    with pytest.raises(SettingsError, match="EMBEDQ_STRICT and EMBEDQ_ACCURACY=exact"):
        ProducerSettings.load(strict=True, accuracy="exact")


def test_strict_and_exact_exclude_each_other(client: Client) -> None:
    """Only the CPU computes in fp32, so nobody could serve such a job."""
    with pytest.raises(SettingsError, match="strict and accuracy=exact exclude each other"):
        client.encode(["a"], strict=True, accuracy="exact")
