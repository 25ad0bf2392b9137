"""What may be concluded from a worker's pulse: pure rules, and the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from embedq_worker.main_process.liveness import BROKER_WAIT_S, GRACE_S, Liveness, read_all, write

PULSE = Liveness("worker", at=100.0, state="healthy", connected=True, engine_timeout_s=300.0)


@pytest.mark.parametrize("state", ["starting", "healthy", "degraded", "probing"])
def test_a_worker_in_any_state_lives(state: str) -> None:
    """A degraded worker serves, and one that starts or probes will: none is to be started anew."""
    assert replace(PULSE, state=state).unhealthy_reason(120.0, 30.0) is None


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
def test_stale_stuck_and_looping_workers_are_unwell(
    changed: dict[str, object], now_s: float, words: str
) -> None:
    """Silence, an engine past its deadline, a crash loop and a file of another boot are reasons."""
    objection = replace(PULSE, **changed).unhealthy_reason(now_s, 30.0)  # type: ignore[arg-type] # a test's keywords

    assert objection is not None and words in objection


def test_lost_broker_is_no_reason_to_start_anew() -> None:
    """A worker without its broker lives, is not ready, and may be silent for one long try."""
    waiting = replace(PULSE, connected=False)

    assert waiting.unhealthy_reason(100 + 30 + BROKER_WAIT_S, 30.0) is None
    assert not waiting.is_ready()
    assert PULSE.is_ready()


def test_long_batch_is_not_stuck_while_its_engine_rests() -> None:
    """A batch that waits for Redis is old, and nothing is wrong with its worker."""
    assert replace(PULSE, batch_since=-5_000.0).unhealthy_reason(101.0, 30.0) is None


def test_pulse_survives_its_file_and_garbage_is_left_out(tmp_path: Path) -> None:
    """A pulse comes back from its file; files that are none hide no other."""
    write(tmp_path, PULSE)
    for name, content in {"a": b"", "b": b"[]", "c": b'{"worker": 1}', "d": b"\xff"}.items():
        (tmp_path / f"{name}.liveness").write_bytes(content)

    assert list(read_all(tmp_path)) == [PULSE]
    assert list(read_all(tmp_path, "worker")) == [PULSE]
    assert list(read_all(tmp_path, "other")) == []
