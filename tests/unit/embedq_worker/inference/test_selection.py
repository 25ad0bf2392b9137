"""The engine of a class is the fastest proven one, and the same again at the next start."""

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
def test_candidates(
    accuracy: Accuracy,
    pins: tuple[str, str],
    has_openvino: bool,
    expected: list[Candidate],
) -> None:
    """bf16 where the class allows it; exact is f32; a pin leaves what it says."""
    engine, precision = EngineChoice(pins[0]), PrecisionChoice(pins[1])

    found = candidates(accuracy, engine, precision, has_openvino=has_openvino)

    assert found == expected


def test_fastest_wins_and_bf16_must_win_clearly() -> None:
    """Within a tenth, f32 is the better answer: it serves both classes."""
    assert fastest({BF16: 1.0, F32: 2.0, ORT: 2.1}) == BF16
    assert fastest({BF16: 1.0, F32: 1.05, ORT: 2.0}) == F32
    assert fastest({BF16: 3.0, F32: 1.05, ORT: 1.0}) == ORT


class Stopwatch:
    """Measures by script, and counts how often."""

    def __init__(self, seconds: Mapping[Candidate, float]) -> None:
        self.seconds, self.asked = seconds, 0

    def __call__(self, among: Sequence[Candidate]) -> Mapping[Candidate, float]:
        self.asked += 1
        return self.seconds


def test_choice_is_kept(tmp_path: Path) -> None:
    """The second start does not measure, even if it would measure otherwise."""
    memory = TuningCache(tmp_path / "cache")
    watch = Stopwatch({BF16: 1.0, F32: 2.0})
    assert choose([BF16, F32], "key", memory, watch) == (BF16, "measured")

    watch.seconds = {BF16: 2.0, F32: 1.0}

    assert choose([BF16, F32], "key", memory, watch) == (BF16, "kept")
    assert watch.asked == 1
    kept = json.loads((tmp_path / "cache" / FILE_NAME).read_text())["key"]
    assert kept["seconds"] == {"openvino bf16": 1.0, "openvino f32": 2.0}


def test_other_key_is_measured_anew(tmp_path: Path) -> None:
    """Another model, version, CPU or number of cores is another question."""
    memory = TuningCache(tmp_path)
    watch = Stopwatch({BF16: 1.0, F32: 2.0})

    for cores in ("2", "4", "2"):
        choose([BF16, F32], machine_key(cores=cores), memory, watch)

    assert watch.asked == 2


def test_kept_engine_that_is_gone_is_not_chosen(tmp_path: Path) -> None:
    """Without OpenVINO, what was kept for it does not count."""
    memory = TuningCache(tmp_path)
    choose([BF16, F32, ORT], "key", memory, Stopwatch({BF16: 1.0, ORT: 2.0}))

    assert choose([F32, ORT], "key", memory, Stopwatch({ORT: 1.0})) == (ORT, "measured")


def test_single_candidate_is_not_measured(tmp_path: Path) -> None:
    """A pinned engine needs no measurement and no memory."""
    watch = Stopwatch({})

    assert choose([ORT], "key", TuningCache(tmp_path / "none"), watch) == (ORT, "only")
    assert watch.asked == 0
    assert not (tmp_path / "none").exists()


def test_choice_that_cannot_be_kept_is_not_measured(tmp_path: Path) -> None:
    """It would differ from start to start, and a run could not be resumed."""
    (tmp_path / "cache").write_text("in the way")
    watch = Stopwatch({F32: 1.0})

    assert choose([BF16, F32], "key", TuningCache(tmp_path / "cache"), watch) == (
        BF16,
        "unmeasured",
    )
    assert watch.asked == 0


def test_nothing_proven_leaves_the_last_resort(tmp_path: Path) -> None:
    """Where no engine passed, the fallback is tried again and says why it cannot serve."""
    assert choose([BF16, ORT], "key", TuningCache(tmp_path), Stopwatch({})) == (ORT, "unmeasured")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 3}', '{"key": {"engine": "x"}}'])
def test_damaged_memory_is_measured_over(tmp_path: Path, content: str) -> None:
    """A file that is not ours, or half of one, costs a measurement."""
    (tmp_path / FILE_NAME).write_text(content)

    chosen, why = choose([BF16, F32], "key", TuningCache(tmp_path), Stopwatch({F32: 1.0}))

    assert (chosen, why) == (F32, "measured")


def test_memory_that_others_may_write_is_not_read(tmp_path: Path) -> None:
    """Somebody else does not choose our engine."""
    memory = TuningCache(tmp_path)
    choose([BF16, F32], "key", memory, Stopwatch({BF16: 1.0}))
    (tmp_path / FILE_NAME).chmod(0o666)

    assert choose([BF16, F32], "key", memory, Stopwatch({F32: 1.0}))[0] == F32


def test_workers_that_start_together_measure_once(tmp_path: Path) -> None:
    """Who comes second waits for the answer of the first instead of disturbing it."""
    watch = Stopwatch({BF16: 1.0, F32: 2.0})

    with ThreadPoolExecutor(4) as workers:
        found = list(
            workers.map(
                lambda _: choose([BF16, F32], "key", TuningCache(tmp_path), watch), range(4)
            )
        )

    assert watch.asked == 1
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
