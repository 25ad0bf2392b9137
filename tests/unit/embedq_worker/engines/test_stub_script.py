"""Tests of fault scripts for the stub engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from embedq.errors import EmbedqError, SettingsError
from embedq.testing import stub_vectors
from embedq_worker.engines.stub import EXIT_STATUS, FaultScript, StubEngine, StubTokenizer
from embedq_worker.errors import CompileFailed, DeviceLost, EngineError, FailureReason, InferFailed
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.packing import build_padded
from embedq_worker.inference.selftest import GOLDEN, run

TEXTS = ["one", "two", "three"]
#: Program that opens a stub with the fault script in its argument and infers one text.
PROGRAM = """
import sys
from pathlib import Path
from embedq_worker.engines.stub import FaultScript
from embedq_worker.engines.stub import StubEngine, StubTokenizer
from embedq_worker.inference.packing import build_padded
engine = StubEngine(script=FaultScript(Path(sys.argv[1])))
engine.infer(build_padded(StubTokenizer().tokenize(["text"]), [0], 0))
"""


@pytest.fixture
def script(tmp_path: Path) -> FaultScript:
    """Return a fault script whose file does not exist yet."""
    return FaultScript(tmp_path / "faults")


def infer(engine: StubEngine) -> np.ndarray:
    """Infer TEXTS as one token batch, float32 [n, D]."""
    batch = build_padded(StubTokenizer().tokenize(TEXTS), range(len(TEXTS)), 0)
    return engine.infer(batch)[:, 0]


def test_engine_follows_changes_of_its_script(script: FaultScript) -> None:
    engine = StubEngine(script=script)
    expected = stub_vectors(TEXTS).tobytes()

    assert infer(engine).tobytes() == expected
    script.replace("infer=raise")
    with pytest.raises(InferFailed):
        infer(engine)
    script.replace()
    assert infer(engine).tobytes() == expected


@pytest.mark.parametrize(
    ("kind", "error", "reason"),
    [
        ("device_lost", DeviceLost, FailureReason.DEVICE_LOST),
        ("device_unknown", DeviceLost, FailureReason.DEVICE_UNKNOWN),
        ("out_of_memory", InferFailed, FailureReason.OUT_OF_MEMORY),
    ],
)
def test_driver_faults_have_the_reasons_of_real_ones(
    kind: str, error: type[EngineError], reason: FailureReason, script: FaultScript
) -> None:
    script.replace(f"infer={kind}")

    with pytest.raises(error) as caught:
        infer(StubEngine(script=script))

    assert caught.value.reason is reason


@pytest.mark.parametrize("kind", ["raise", "device_lost"])
def test_fault_at_init_raises_compile_failed(kind: str, script: FaultScript) -> None:
    script.replace(f"init={kind}")

    with pytest.raises(CompileFailed):
        StubEngine(script=script)


@pytest.mark.parametrize("kind", ["nan", "wrong"])
def test_wrong_vectors_fail_the_self_test(kind: str, script: FaultScript) -> None:
    script.replace(f"infer={kind}")
    engine = StubEngine(script=script)
    embedder = Embedder(StubTokenizer(), engine, token_budget=512)

    report = run(embedder, None, stub_vectors(GOLDEN))
    embedder.close()

    assert infer(engine).tobytes() != stub_vectors(TEXTS).tobytes()
    assert not report.passed


def test_fault_slow_delays_the_inference(
    script: FaultScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("embedq_worker.engines.stub.time.sleep", slept.append)
    script.replace("infer=slow seconds=2.5")

    vectors = infer(StubEngine(script=script))

    assert slept == [2.5]
    assert vectors.tobytes() == stub_vectors(TEXTS).tobytes()


@pytest.mark.parametrize(("line", "exit_code"), [("exit", EXIT_STATUS), ("segfault", -11)])
@pytest.mark.parametrize("when", ["init", "infer"])
def test_fault_with_first_1_ends_one_process_per_script(
    when: str, line: str, exit_code: int, tmp_path: Path
) -> None:
    script = FaultScript(tmp_path / "faults")
    exit_codes = []
    for _ in range(2):
        script.replace(f"{when}={line} first=1  # a comment")
        for _ in range(2):
            words = [sys.executable, "-c", PROGRAM, str(tmp_path / "faults")]
            exit_codes.append(
                subprocess.run(words, stderr=subprocess.DEVNULL, timeout=20).returncode
            )

    assert exit_codes == [exit_code, 0, exit_code, 0]


@pytest.mark.parametrize(
    "line",
    ["infer=hung", "inferr=hang", "init=nan", "hang", "infer=slow seconds=x", "infer=slow for=1"],
)
def test_invalid_script_line_is_refused(line: str, tmp_path: Path) -> None:
    script = FaultScript(tmp_path / "faults")
    (tmp_path / "faults").write_text(line)

    with pytest.raises(SettingsError, match="EMBEDQ_STUB_FAULTS"):
        script.replace(line)
    with pytest.raises(EmbedqError, match="EMBEDQ_STUB_FAULTS"):
        infer(StubEngine(script=script))
