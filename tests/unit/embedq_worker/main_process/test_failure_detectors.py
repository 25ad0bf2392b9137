"""What is forgiven, what is slow, and what is a loop of deaths."""

from __future__ import annotations

import pytest

from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq_worker.errors import FailureReason
from embedq_worker.main_process.device_health import (
    LEARN_FROM,
    CrashLoopDetector,
    FailureWindow,
    SlowdownDetector,
)


@pytest.mark.parametrize(
    "reason", [FailureReason.DEVICE_LOST, FailureReason.NOT_FINITE, FailureReason.SHADOW_MISMATCH]
)
def test_lost_and_wrong_devices_are_not_forgiven(reason: FailureReason) -> None:
    """One is enough, however many failures are allowed."""
    assert FailureWindow(100, 60).add(reason, 0.0)


def test_failures_are_forgiven_until_there_add() -> None:
    """The third within a minute is one too many; those of an hour ago are forgotten."""
    failures = FailureWindow(3, 60)

    answers = [failures.add(FailureReason.INFER_FAILED, at) for at in (0, 30, 61, 62)]

    assert answers == [False, False, False, True]


def test_device_that_has_become_slow_is_found() -> None:
    """Five batches in a row over five times as long as at first; one slow batch is nothing."""
    pace = SlowdownDetector(5.0, 5)

    began = [pace.add(0.1) for _ in range(LEARN_FROM)]
    blips = [pace.add(seconds) for seconds in (9.0, 0.1, 9.0, 9.0, 9.0, 9.0)]

    assert not any(began + blips)
    assert pace.add(9.0)


def test_device_that_comes_back_slow_is_found() -> None:
    """A new process knows from the one before it how fast the device was."""
    pace = SlowdownDetector(5.0, 2, normal_s=0.1)

    assert [pace.add(0.9), pace.add(0.9)] == [False, True]


def test_factor_of_zero_never_calls_a_device_slow() -> None:
    """The trigger can be switched off."""
    pace = SlowdownDetector(0.0, 1)

    assert not any(pace.add(10.0**n) for n in range(20))


def child(pid: int, state: WorkerState = WorkerState.STARTING) -> WorkerStatus:
    """Return what a child says of itself."""
    return WorkerStatus("npu0", state, 0.0, pid)


def test_children_that_die_before_they_are_ready_are_a_loop() -> None:
    """The fifth replacement of a child that never came up is one too many."""
    deaths = CrashLoopDetector(5, 60)

    answers = []
    for pid in range(1, 7):
        deaths.update(child(pid), now_s=pid)
        answers.append(deaths.is_early_loop)

    assert answers == [False] * 5 + [True]


def test_children_that_served_are_no_early_loop() -> None:
    """What dies under a batch is another matter than what never comes up."""
    deaths = CrashLoopDetector(5, 60)

    for pid in range(1, 20):
        deaths.update(child(pid), now_s=pid)
        deaths.update(child(pid, WorkerState.HEALTHY), now_s=pid)

    assert deaths.is_loop
    assert not deaths.is_early_loop


def test_child_that_came_up_ends_a_row_of_deaths() -> None:
    """Only children that die one after the other are a loop, however long each takes."""
    deaths = CrashLoopDetector(5, 60)

    for pid in range(1, 40):
        deaths.update(
            child(pid, WorkerState.HEALTHY if pid % 5 == 0 else WorkerState.STARTING),
            now_s=99 * pid,
        )

        assert not deaths.is_early_loop


def test_rare_deaths_are_no_loop() -> None:
    """One a window may go on for ever."""
    deaths = CrashLoopDetector(5, 60)

    for pid in range(1, 20):
        deaths.update(child(pid), now_s=pid * 60)

    assert not deaths.is_loop


def test_children_that_the_worker_ended_itself_do_not_count() -> None:
    """Replacing a child is no death."""
    deaths = CrashLoopDetector(1, 60)

    deaths.update(child(1), now_s=0)
    deaths.update(child(2), now_s=1, ended_pid=1)

    assert not deaths.is_loop
