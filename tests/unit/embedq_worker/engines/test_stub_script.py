"""A fault script breaks the stub device as it works, and lets it be whole again."""

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
#: Opens a stub with the script of its first argument and infers one text.
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
    """A script whose file is not there yet."""
    return FaultScript(tmp_path / "faults")


def infer(engine: StubEngine) -> np.ndarray:
    """Infer the texts as one token batch, float32 [n, D]."""
    batch = build_padded(StubTokenizer().tokenize(TEXTS), range(len(TEXTS)), 0)
    return engine.infer(batch)[:, 0]


def test_faults_come_and_go_while_the_engine_lives(script: FaultScript) -> None:
    """An engine that is open obeys the script as it is at each inference; no script, no fault."""
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
def test_driver_faults_have_the_reason_of_the_real_ones(
    kind: str, error: type[EngineError], reason: FailureReason, script: FaultScript
) -> None:
    """They are said in Level Zero's words and told apart as OpenVINO's errors are."""
    script.replace(f"infer={kind}")

    with pytest.raises(error) as caught:
        infer(StubEngine(script=script))

    assert caught.value.reason is reason


@pytest.mark.parametrize("kind", ["raise", "device_lost"])
def test_device_that_does_not_open_says_so(kind: str, script: FaultScript) -> None:
    """A fault of the start is the error of an engine that cannot be opened."""
    script.replace(f"init={kind}")

    with pytest.raises(CompileFailed):
        StubEngine(script=script)


@pytest.mark.parametrize("kind", ["nan", "wrong"])
def test_spoilt_vectors_do_not_pass_the_self_test(kind: str, script: FaultScript) -> None:
    """A device that computes nonsense raises nothing; the golden texts find it."""
    script.replace(f"infer={kind}")
    engine = StubEngine(script=script)
    embedder = Embedder(StubTokenizer(), engine, token_budget=512)

    report = run(embedder, None, stub_vectors(GOLDEN))
    embedder.close()

    assert infer(engine).tobytes() != stub_vectors(TEXTS).tobytes()
    assert not report.passed


def test_slow_device_takes_its_time(script: FaultScript, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each inference is longer by the seconds of the script, and right."""
    slept: list[float] = []
    monkeypatch.setattr("embedq_worker.engines.stub.time.sleep", slept.append)
    script.replace("infer=slow seconds=2.5")

    vectors = infer(StubEngine(script=script))

    assert slept == [2.5]
    assert vectors.tobytes() == stub_vectors(TEXTS).tobytes()


@pytest.mark.parametrize(("line", "code"), [("exit", EXIT_STATUS), ("segfault", -11)])
@pytest.mark.parametrize("when", ["init", "infer"])
def test_process_ends_as_often_as_the_script_says(
    when: str, line: str, code: int, tmp_path: Path
) -> None:
    """`first=1` ends one process and lets the next live; a script written anew counts anew."""
    script = FaultScript(tmp_path / "faults")
    found = []
    for _ in range(2):
        script.replace(f"{when}={line} first=1  # a remark")
        for _ in range(2):
            words = [sys.executable, "-c", PROGRAM, str(tmp_path / "faults")]
            found.append(subprocess.run(words, stderr=subprocess.DEVNULL, timeout=20).returncode)

    assert found == [code, 0, code, 0]


@pytest.mark.parametrize(
    "line",
    ["infer=hung", "inferr=hang", "init=nan", "hang", "infer=slow seconds=x", "infer=slow for=1"],
)
def test_line_that_is_none_is_refused(line: str, tmp_path: Path) -> None:
    """A typo is named where the script is written and where it is read."""
    script = FaultScript(tmp_path / "faults")
    (tmp_path / "faults").write_text(line)

    with pytest.raises(SettingsError, match="EMBEDQ_STUB_FAULTS"):
        script.replace(line)
    with pytest.raises(EmbedqError, match="EMBEDQ_STUB_FAULTS"):
        infer(StubEngine(script=script))
