"""Tests of the liveness file and of the rules that call a worker unhealthy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from embedq_worker.main_process.liveness import BROKER_WAIT_S, GRACE_S, Liveness, read_all, write

LIVENESS = Liveness("worker", at=100.0, state="healthy", connected=True, engine_timeout_s=300.0)


@pytest.mark.parametrize("state", ["starting", "healthy", "degraded", "probing"])
def test_recent_liveness_file_is_healthy_in_any_state(state: str) -> None:
    assert replace(LIVENESS, state=state).unhealthy_reason(120.0, 30.0) is None


@pytest.mark.parametrize(
    ("changed", "now_s", "words"),
    [
        ({}, 131.0, "31 s old; the limit is 30 s"),
        ({"crash_loop": True}, 101.0, "dies repeatedly"),
        ({"engine_since": 99.0 - 300 - GRACE_S}, 101.0, "the timeout is 300 s"),
        ({"connected": False}, 131.0 + BROKER_WAIT_S, "the limit is 95 s"),
        ({}, 50.0, "before this machine was started"),
    ],
)
def test_stale_stuck_or_crash_looping_worker_is_unhealthy(
    changed: dict[str, object], now_s: float, words: str
) -> None:
    reason = replace(LIVENESS, **changed).unhealthy_reason(now_s, 30.0)  # type: ignore[arg-type] # a test's keywords

    assert reason is not None and words in reason


def test_worker_without_its_broker_is_healthy_but_not_ready() -> None:
    disconnected = replace(LIVENESS, connected=False)

    assert disconnected.unhealthy_reason(100 + 30 + BROKER_WAIT_S, 30.0) is None
    assert not disconnected.is_ready()
    assert LIVENESS.is_ready()


def test_long_batch_without_an_engine_call_is_healthy() -> None:
    assert replace(LIVENESS, batch_since=-5_000.0).unhealthy_reason(101.0, 30.0) is None


def test_garbage_files_do_not_hide_a_liveness_file(tmp_path: Path) -> None:
    write(tmp_path, LIVENESS)
    for name, content in {"a": b"", "b": b"[]", "c": b'{"worker": 1}', "d": b"\xff"}.items():
        (tmp_path / f"{name}.liveness").write_bytes(content)

    assert list(read_all(tmp_path)) == [LIVENESS]
    assert list(read_all(tmp_path, "worker")) == [LIVENESS]
    assert list(read_all(tmp_path, "other")) == []
