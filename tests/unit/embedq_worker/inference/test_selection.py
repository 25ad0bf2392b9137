"""Tests of choosing the fastest engine of a class and of the tuning cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedq.protocol.contract import Accuracy, Precision
from embedq_worker.inference.selection import (
    FILE_NAME,
    Candidate,
    CpuConfig,
    TuningCache,
    candidates,
    choose,
    fastest,
    machine_key,
)
from embedq_worker.settings import EngineChoice, PrecisionChoice, WorkerSettings

BF16 = Candidate(EngineChoice.OPENVINO, Precision.BF16)
F32 = Candidate(EngineChoice.OPENVINO, Precision.F32)
ORT = Candidate(EngineChoice.ONNXRUNTIME, Precision.F32)
AUTO = (EngineChoice.AUTO, PrecisionChoice.AUTO)


@pytest.mark.parametrize(
    ("accuracy", "pins", "has_openvino", "expected"),
    [
        (Accuracy.STANDARD, AUTO, True, [BF16, F32, ORT]),
        (Accuracy.STANDARD, AUTO, False, [ORT]),
        (Accuracy.EXACT, AUTO, True, [F32, ORT]),
        (Accuracy.EXACT, AUTO, False, [ORT]),
        (Accuracy.STANDARD, ("onnxruntime", "auto"), True, [ORT]),
        (Accuracy.STANDARD, ("openvino", "auto"), True, [BF16, F32]),
        (Accuracy.STANDARD, ("openvino", "bf16"), True, [BF16]),
        (Accuracy.STANDARD, ("auto", "f32"), True, [F32, ORT]),
        (Accuracy.EXACT, ("openvino", "bf16"), True, [F32]),
        (Accuracy.STANDARD, ("auto", "bf16"), False, []),
        (Accuracy.STANDARD, ("openvino", "auto"), False, []),
        (Accuracy.STANDARD, ("auto", "int8"), True, []),
    ],
)
def test_candidates_follow_class_pins_and_installed_runtimes(
    accuracy: Accuracy,
    pins: tuple[str, str],
    has_openvino: bool,
    expected: list[Candidate],
) -> None:
    engine, precision = EngineChoice(pins[0]), PrecisionChoice(pins[1])

    found = candidates(accuracy, engine, precision, has_openvino=has_openvino)

    assert found == expected


def test_fastest_engine_wins_and_bf16_only_by_a_tenth() -> None:
    assert fastest({BF16: 1.0, F32: 2.0, ORT: 2.1}) == BF16
    assert fastest({BF16: 1.0, F32: 1.05, ORT: 2.0}) == F32
    assert fastest({BF16: 3.0, F32: 1.05, ORT: 1.0}) == ORT


class Stopwatch:
    """Returns scripted measurements and counts the calls."""

    def __init__(self, seconds: Mapping[Candidate, float]) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, _candidates: Sequence[Candidate]) -> Mapping[Candidate, float]:
        self.calls += 1
        return self.seconds


def test_choice_is_read_from_the_cache_at_the_next_start(tmp_path: Path) -> None:
    cache = TuningCache(tmp_path / "cache")
    stopwatch = Stopwatch({BF16: 1.0, F32: 2.0})
    assert choose([BF16, F32], "key", cache, stopwatch) == (BF16, "measured")

    stopwatch.seconds = {BF16: 2.0, F32: 1.0}

    assert choose([BF16, F32], "key", cache, stopwatch) == (BF16, "cached")
    assert stopwatch.calls == 1
    stored = json.loads((tmp_path / "cache" / FILE_NAME).read_text())["key"]
    assert stored["seconds"] == {"openvino bf16": 1.0, "openvino f32": 2.0}


def test_each_machine_key_is_measured_once(tmp_path: Path) -> None:
    cache = TuningCache(tmp_path)
    stopwatch = Stopwatch({BF16: 1.0, F32: 2.0})

    for cores in ("2", "4", "2"):
        choose([BF16, F32], machine_key(cores=cores), cache, stopwatch)

    assert stopwatch.calls == 2


def test_cached_engine_that_is_no_longer_a_candidate_is_not_chosen(tmp_path: Path) -> None:
    cache = TuningCache(tmp_path)
    choose([BF16, F32, ORT], "key", cache, Stopwatch({BF16: 1.0, ORT: 2.0}))

    assert choose([F32, ORT], "key", cache, Stopwatch({ORT: 1.0})) == (ORT, "measured")


def test_single_candidate_is_not_measured(tmp_path: Path) -> None:
    stopwatch = Stopwatch({})

    assert choose([ORT], "key", TuningCache(tmp_path / "none"), stopwatch) == (ORT, "only")
    assert stopwatch.calls == 0
    assert not (tmp_path / "none").exists()


def test_choice_that_cannot_be_stored_is_not_measured(tmp_path: Path) -> None:
    # A measurement per start could choose another engine each time, and a run could not be resumed.
    (tmp_path / "cache").write_text("in the way")
    stopwatch = Stopwatch({F32: 1.0})

    assert choose([BF16, F32], "key", TuningCache(tmp_path / "cache"), stopwatch) == (
        BF16,
        "unmeasured",
    )
    assert stopwatch.calls == 0


def test_last_candidate_is_chosen_if_none_was_measured(tmp_path: Path) -> None:
    assert choose([BF16, ORT], "key", TuningCache(tmp_path), Stopwatch({})) == (ORT, "unmeasured")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 3}', '{"key": {"engine": "x"}}'])
def test_damaged_cache_is_measured_again(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)

    chosen, source = choose([BF16, F32], "key", TuningCache(tmp_path), Stopwatch({F32: 1.0}))

    assert (chosen, source) == (F32, "measured")


def test_cache_writable_by_others_is_not_read(tmp_path: Path) -> None:
    cache = TuningCache(tmp_path)
    choose([BF16, F32], "key", cache, Stopwatch({BF16: 1.0}))
    (tmp_path / FILE_NAME).chmod(0o666)

    assert choose([BF16, F32], "key", cache, Stopwatch({F32: 1.0}))[0] == F32


def test_concurrent_starts_measure_once(tmp_path: Path) -> None:
    stopwatch = Stopwatch({BF16: 1.0, F32: 2.0})

    with ThreadPoolExecutor(4) as workers:
        found = list(
            workers.map(
                lambda _: choose([BF16, F32], "key", TuningCache(tmp_path), stopwatch), range(4)
            )
        )

    assert stopwatch.calls == 1
    assert {chosen for chosen, _ in found} == {BF16}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"threads": 4}, CpuConfig(4, 4, 512)),
        ({"threads": 4, "streams": 2, "token_budget": 300}, CpuConfig(4, 2, 300)),
        ({"threads": 2, "streams": 8}, CpuConfig(2, 2, 512)),
    ],
)
def test_cpu_config_from_settings(values: dict[str, int], expected: CpuConfig) -> None:
    settings = WorkerSettings(**values)  # type: ignore[arg-type]

    assert CpuConfig.from_settings(settings) == expected
