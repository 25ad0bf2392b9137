"""Tests of the time and token statistics of an engine."""

from __future__ import annotations

from contextlib import ExitStack

from embedq_worker.inference.stats import EngineMeter, EngineStats


class Clock:
    """Clock that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_overlapping_inferences_count_once_as_busy() -> None:
    clock = Clock()
    meter = EngineMeter(clock)
    first, second = ExitStack(), ExitStack()

    first.enter_context(meter.inferring())
    clock.now += 1
    second.enter_context(meter.inferring())
    clock.now += 2
    first.close()
    clock.now += 1
    second.close()
    clock.now += 4

    totals = meter.totals()
    assert (totals.infer_s, totals.busy_s, totals.wall_s) == (6, 4, 8)
    assert totals.device_busy_ratio == 0.5


def test_running_inference_counts_as_busy_until_now() -> None:
    clock = Clock()
    meter = EngineMeter(clock)

    with meter.inferring():
        clock.now += 5
        running = meter.totals()

    assert running.busy_s == 5
    assert meter.totals().busy_s == 5


def test_failed_inference_is_no_longer_busy() -> None:
    clock = Clock()
    meter = EngineMeter(clock)

    try:
        with meter.inferring():
            raise ValueError
    except ValueError:
        clock.now += 3

    assert meter.totals().busy_s == 0


def test_totals_are_a_snapshot_of_all_batches() -> None:
    meter = EngineMeter()
    meter.add(texts=3, tokens=30, computed_tokens=40, inferences=2)
    before = meter.totals()

    meter.add(texts=1, tokens=10, computed_tokens=10, inferences=1)

    assert (before.batches, before.texts, before.pack_fill_ratio) == (1, 3, 0.75)
    after = meter.totals()
    assert (after.batches, after.texts, after.tokens, after.inferences) == (2, 4, 40, 3)


def test_ratios_without_measurements_are_defined() -> None:
    assert (EngineStats().device_busy_ratio, EngineStats().pack_fill_ratio) == (0.0, 1.0)
