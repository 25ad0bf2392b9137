"""Tests of the detectors of repeated failures, slow devices and crash loops."""

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
def test_lost_or_wrong_device_is_unhealthy_at_once(reason: FailureReason) -> None:
    assert FailureWindow(100, 60).add(reason, 0.0)


def test_third_failure_within_the_window_is_one_too_many() -> None:
    failures = FailureWindow(3, 60)

    results = [failures.add(FailureReason.INFER_FAILED, at) for at in (0, 30, 61, 62)]

    assert results == [False, False, False, True]


def test_five_consecutive_slow_batches_are_a_slowdown() -> None:
    detector = SlowdownDetector(5.0, 5)

    learning = [detector.add(0.1) for _ in range(LEARN_FROM)]
    interrupted = [detector.add(seconds) for seconds in (9.0, 0.1, 9.0, 9.0, 9.0, 9.0)]

    assert not any(learning + interrupted)
    assert detector.add(9.0)


def test_known_normal_time_detects_a_device_that_starts_slow() -> None:
    detector = SlowdownDetector(5.0, 2, normal_s=0.1)

    assert [detector.add(0.9), detector.add(0.9)] == [False, True]


def test_factor_0_disables_the_slowdown_detector() -> None:
    detector = SlowdownDetector(0.0, 1)

    assert not any(detector.add(10.0**n) for n in range(20))


def pool(pid: int, state: WorkerState = WorkerState.STARTING) -> WorkerStatus:
    return WorkerStatus("npu0", state, 0.0, pid)


def test_exits_before_healthy_are_an_early_crash_loop() -> None:
    detector = CrashLoopDetector(5, 60)

    results = []
    for pid in range(1, 7):
        detector.update(pool(pid), now_s=pid)
        results.append(detector.is_early_loop)

    assert results == [False] * 5 + [True]


def test_exits_of_healthy_pool_processes_are_not_an_early_crash_loop() -> None:
    detector = CrashLoopDetector(5, 60)

    for pid in range(1, 20):
        detector.update(pool(pid), now_s=pid)
        detector.update(pool(pid, WorkerState.HEALTHY), now_s=pid)

    assert detector.is_loop
    assert not detector.is_early_loop


def test_healthy_pool_process_ends_a_series_of_early_exits() -> None:
    detector = CrashLoopDetector(5, 60)

    for pid in range(1, 40):
        detector.update(
            pool(pid, WorkerState.HEALTHY if pid % 5 == 0 else WorkerState.STARTING),
            now_s=99 * pid,
        )

        assert not detector.is_early_loop


def test_one_exit_per_window_is_not_a_crash_loop() -> None:
    detector = CrashLoopDetector(5, 60)

    for pid in range(1, 20):
        detector.update(pool(pid), now_s=pid * 60)

    assert not detector.is_loop


def test_pool_processes_ended_by_the_worker_do_not_count() -> None:
    detector = CrashLoopDetector(1, 60)

    detector.update(pool(1), now_s=0)
    detector.update(pool(2), now_s=1, ended_pid=1)

    assert not detector.is_loop
