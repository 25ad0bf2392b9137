"""The busy time of an engine counts each moment once, however many inferences share it."""

from __future__ import annotations

from contextlib import ExitStack

from embedq_worker.inference.stats import EngineMeter, EngineStats


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_inferences_that_overlap_count_once_as_busy() -> None:
    """Two inferences of 3 s that share 2 s are 6 s of inference and 4 s of a busy engine."""
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


def test_inference_under_way_counts_until_now() -> None:
    """A long inference shows as busy before it ends, and only once when it has."""
    clock = Clock()
    meter = EngineMeter(clock)

    with meter.inferring():
        clock.now += 5
        under_way = meter.totals()

    assert under_way.busy_s == 5
    assert meter.totals().busy_s == 5


def test_failed_inference_ends() -> None:
    """An engine that raises is no longer busy."""
    clock = Clock()
    meter = EngineMeter(clock)

    try:
        with meter.inferring():
            raise ValueError
    except ValueError:
        clock.now += 3

    assert meter.totals().busy_s == 0


def test_batches_add_up_and_a_copy_stays() -> None:
    """What was handed out before does not change with the next batch."""
    meter = EngineMeter()
    meter.add(texts=3, tokens=30, computed_tokens=40, inferences=2)
    before = meter.totals()

    meter.add(texts=1, tokens=10, computed_tokens=10, inferences=1)

    assert (before.batches, before.texts, before.pack_fill_ratio) == (1, 3, 0.75)
    after = meter.totals()
    assert (after.batches, after.texts, after.tokens, after.inferences) == (2, 4, 40, 3)


def test_nothing_measured_is_no_division() -> None:
    """Stats of no time and no tokens have ratios too."""
    assert (EngineStats().device_busy_ratio, EngineStats().pack_fill_ratio) == (0.0, 1.0)
