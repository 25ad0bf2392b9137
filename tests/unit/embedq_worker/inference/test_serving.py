"""Each accuracy class is served by an engine that has proven it, opened when a batch wants it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from embedq.errors import SettingsError
from embedq.protocol.contract import Accuracy, Precision
from embedq_worker.engines.base import TokenBatch
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import CompileFailed, EngineError, FailureReason
from embedq_worker.inference.embedder import Vectors
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.selection import Candidate, TuningCache
from embedq_worker.inference.serving import EngineSet
from embedq_worker.model.resolve import Model
from embedq_worker.settings import DeviceChoice, EngineChoice, PrecisionChoice, WorkerSettings


def opener(model: Model, cache: Path, **settings: object) -> EngineOpener:
    """Make an opener for a worker on the CPU."""
    values = {"device": DeviceChoice.CPU, "cache_dir": cache, "threads": 2, **settings}
    return EngineOpener(WorkerSettings(**values), model)  # type: ignore[arg-type]


def serve(opened: EngineOpener, model: Model) -> EngineSet:
    """Serve class standard with what opens."""
    standard = opened.open_cpu(Accuracy.STANDARD)
    return EngineSet(model.model_info(), standard, lambda: opened.open_cpu(Accuracy.EXACT))


def test_f32_engine_serves_both_classes(model: Model, tmp_path: Path) -> None:
    """One engine is enough where it is exact; nothing else is opened."""
    worker = serve(opener(model, tmp_path, engine=EngineChoice.ONNXRUNTIME), model)

    exact = worker.engine_for(Accuracy.EXACT)
    worker.close()

    assert exact.engine is worker.standard.engine
    assert (worker.standard.engine.name, worker.standard.engine.precision) == (
        "onnxruntime",
        Precision.F32,
    )


def test_bf16_engine_is_joined_by_an_exact_one(model: Model, tmp_path: Path) -> None:
    """A worker whose standard engine rounds opens a second for exact, at the first exact batch."""
    opened = opener(model, tmp_path, precision=PrecisionChoice.BF16)
    try:
        worker = serve(opened, model)
    except CompileFailed:
        pytest.skip("this CPU has no bf16")
    assert worker.engine_for(Accuracy.STANDARD).engine.precision is Precision.BF16

    exact = worker.engine_for(Accuracy.EXACT)

    assert exact.engine.precision is Precision.F32
    assert exact.report.min_cosine >= 0.99999
    assert worker.engine_for(Accuracy.EXACT) is exact
    assert worker.standard.engine.precision is Precision.BF16
    worker.close()


def test_choice_is_measured_once(model: Model, tmp_path: Path) -> None:
    """The first start measures all candidates, the second takes what was kept."""
    first = opener(model, tmp_path).open_cpu(Accuracy.STANDARD)
    second = opener(model, tmp_path).open_cpu(Accuracy.STANDARD)

    assert (first.why, second.why) == ("measured", "kept")
    assert (first.engine.name, first.engine.precision) == (
        second.engine.name,
        second.engine.precision,
    )
    first.close()
    second.close()


def test_precision_that_no_engine_has_is_refused(model: Model, tmp_path: Path) -> None:
    """int8 by a setting, without a quantized model, is a SettingsError with both names."""
    opened = opener(model, tmp_path, precision=PrecisionChoice.INT8)

    with pytest.raises(SettingsError, match="EMBEDQ_PRECISION=int8"):
        opened.open_cpu(Accuracy.STANDARD)


def test_kept_engine_that_does_not_open_gives_way(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where OpenVINO was chosen and now refuses, onnxruntime serves and says that it fell back."""

    def refuse(*_: object) -> None:
        raise CompileFailed("not today", FailureReason.COMPILE_REFUSED)

    monkeypatch.setattr(
        TuningCache, "get", lambda self, key, among: Candidate(EngineChoice.OPENVINO, Precision.F32)
    )
    monkeypatch.setattr("embedq_worker.engines.openvino_cpu.OpenVinoCpuEngine.__init__", refuse)

    proven = opener(model, tmp_path, precision=PrecisionChoice.F32).open_cpu(Accuracy.STANDARD)
    proven.close()

    assert (proven.engine.name, proven.why) == ("onnxruntime", "fallback")


def test_engine_that_lies_is_not_served(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong vectors end in an EngineError with the reason, never in a worker that serves."""
    honest = OnnxRuntimeEngine.infer

    def double(self: OnnxRuntimeEngine, batch: TokenBatch) -> Vectors:
        return 2 * honest(self, batch)

    monkeypatch.setattr(OnnxRuntimeEngine, "infer", double)

    with pytest.raises(EngineError, match="unit length") as caught:
        opener(model, tmp_path, engine=EngineChoice.ONNXRUNTIME).open_cpu(Accuracy.STANDARD)

    assert caught.value.reason is FailureReason.SELFTEST_FAILED


#: Opens an engine in a process of its own: model, cache, engine.
OPEN_CPU = """
import sys
from pathlib import Path
from embedq.protocol.contract import Accuracy
from embedq_worker.files import DigestCache
from embedq_worker.model.resolve import load_model
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.settings import WorkerSettings

folder, cache, engine = sys.argv[1:]
settings = WorkerSettings(device="cpu", engine=engine, cache_dir=Path(cache))
opener = EngineOpener(settings, load_model(Path(folder), "tiny", DigestCache(Path(cache))))
proven = opener.open_cpu(Accuracy.STANDARD)
print(proven.engine.name, "openvino" in sys.modules)
"""


def test_worker_pinned_to_onnxruntime_never_imports_openvino(model: Model, tmp_path: Path) -> None:
    """Installed and not wanted, it costs nothing; not installed: see test_engine_nodes.py."""
    arguments = [str(model.folder), str(tmp_path), "onnxruntime"]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CPU, *arguments], capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["onnxruntime", "False"], done.stderr
