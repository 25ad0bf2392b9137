"""Tests of opening a verified engine per accuracy class."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.models import cpu_opener

from embedq.errors import SettingsError
from embedq.protocol.contract import Accuracy, Precision
from embedq.protocol.values import Vectors
from embedq_worker.engines.base import TokenBatch
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import CompileFailed, EngineError, FailureReason
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.selection import Candidate, TuningCache
from embedq_worker.inference.serving import EngineSet
from embedq_worker.model.resolve import Model
from embedq_worker.settings import EngineChoice, PrecisionChoice


def open_engine_set(opened: EngineOpener, model: Model) -> EngineSet:
    """Return an engine set whose standard engine is open."""
    standard = opened.open_cpu(Accuracy.STANDARD)
    return EngineSet(model.model_info(), standard, lambda: opened.open_cpu(Accuracy.EXACT))


def test_f32_engine_serves_standard_and_exact(model: Model, tmp_path: Path) -> None:
    engines = open_engine_set(cpu_opener(model, tmp_path, engine=EngineChoice.ONNXRUNTIME), model)

    exact = engines.engine_for(Accuracy.EXACT)
    engines.close()

    assert exact.engine is engines.standard.engine
    assert (engines.standard.engine.name, engines.standard.engine.precision) == (
        "onnxruntime",
        Precision.F32,
    )


def test_first_exact_batch_of_a_bf16_worker_opens_an_f32_engine(
    model: Model, tmp_path: Path
) -> None:
    opened = cpu_opener(model, tmp_path, precision=PrecisionChoice.BF16)
    try:
        engines = open_engine_set(opened, model)
    except CompileFailed:
        pytest.skip("this CPU has no bf16")
    assert engines.engine_for(Accuracy.STANDARD).engine.precision is Precision.BF16

    exact = engines.engine_for(Accuracy.EXACT)

    assert exact.engine.precision is Precision.F32
    assert exact.report.min_cosine >= 0.99999
    assert engines.engine_for(Accuracy.EXACT) is exact
    assert engines.standard.engine.precision is Precision.BF16
    engines.close()


def test_engine_choice_is_measured_once(model: Model, tmp_path: Path) -> None:
    first = cpu_opener(model, tmp_path).open_cpu(Accuracy.STANDARD)
    second = cpu_opener(model, tmp_path).open_cpu(Accuracy.STANDARD)

    assert (first.why, second.why) == ("measured", "cached")
    assert (first.engine.name, first.engine.precision) == (
        second.engine.name,
        second.engine.precision,
    )
    first.close()
    second.close()


def test_precision_int8_without_a_quantized_model_is_refused(model: Model, tmp_path: Path) -> None:
    opened = cpu_opener(model, tmp_path, precision=PrecisionChoice.INT8)

    with pytest.raises(SettingsError, match="EMBEDQ_PRECISION=int8"):
        opened.open_cpu(Accuracy.STANDARD)


def test_cached_engine_that_does_not_open_is_replaced_by_onnxruntime(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CompileFailed("not today", FailureReason.COMPILE_REFUSED)

    monkeypatch.setattr(
        TuningCache, "get", lambda self, key, among: Candidate(EngineChoice.OPENVINO, Precision.F32)
    )
    monkeypatch.setattr("embedq_worker.engines.openvino_cpu.OpenVinoCpuEngine.__init__", refuse)

    verified = cpu_opener(model, tmp_path, precision=PrecisionChoice.F32).open_cpu(
        Accuracy.STANDARD
    )
    verified.close()

    assert (verified.engine.name, verified.why) == ("onnxruntime", "fallback")


def test_engine_with_wrong_vectors_is_refused(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxRuntimeEngine.infer

    def double(self: OnnxRuntimeEngine, batch: TokenBatch) -> Vectors:
        return 2 * original(self, batch)

    monkeypatch.setattr(OnnxRuntimeEngine, "infer", double)

    with pytest.raises(EngineError, match="unit length") as caught:
        cpu_opener(model, tmp_path, engine=EngineChoice.ONNXRUNTIME).open_cpu(Accuracy.STANDARD)

    assert caught.value.reason is FailureReason.SELFTEST_FAILED


#: Script that opens an engine; arguments: model folder, cache folder, engine.
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
verified = opener.open_cpu(Accuracy.STANDARD)
print(verified.engine.name, "openvino" in sys.modules)
"""


def test_worker_with_engine_onnxruntime_does_not_import_openvino(
    model: Model, tmp_path: Path
) -> None:
    arguments = [str(model.folder), str(tmp_path), "onnxruntime"]
    done = subprocess.run(
        [sys.executable, "-c", OPEN_CPU, *arguments], capture_output=True, text=True, check=False
    )

    assert done.stdout.split() == ["onnxruntime", "False"], done.stderr
