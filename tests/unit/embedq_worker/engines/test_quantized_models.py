"""Tests of quantized models: creating, storing, verifying and serving them."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.models import WORDS, cpu_opener

from embedq.errors import InputError
from embedq.protocol.contract import Accuracy, Precision
from embedq_worker.cli.quantize import (
    MIN_TEXTS,
    Line,
    compare,
    embed_lines,
    quantize_graph,
    sample_texts,
)
from embedq_worker.engines.factory import open_engine
from embedq_worker.engines.model_cache import BLOB, QuantizationReport, QuantizedModelStore
from embedq_worker.errors import NotQuantized
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.opener import open_serving
from embedq_worker.inference.serving import EngineSet
from embedq_worker.model.resolve import Model
from embedq_worker.settings import DeviceChoice, WorkerSettings

QUALITY = QuantizationReport(300, 1000, 0.997, 0.98, 0.94, ((7, 0.98, 0.5),), "NNCF 3.4.0")


def test_quantized_model_survives_storage(model: Model, tmp_path: Path) -> None:
    store = QuantizedModelStore(tmp_path / "cache", model)

    assert store.store("ab" * 32, b"graph", QUALITY)

    found = QuantizedModelStore(tmp_path / "cache", model).load()
    assert found is not None
    assert (found.name, found.graph, found.report) == ("ab" * 8, b"graph", QUALITY)
    assert store.current() == "ab" * 8


def test_newer_quantized_model_replaces_the_older(model: Model, tmp_path: Path) -> None:
    store = QuantizedModelStore(tmp_path / "cache", model)
    store.store("ab" * 32, b"old", QUALITY)

    store.store("cd" * 32, b"new", QUALITY)

    found = store.load()
    assert found is not None and found.graph == b"new"
    assert store.current() == "cd" * 8


def test_announced_and_served_quantized_model_are_the_same_in_a_merged_folder(
    model: Model, tmp_path: Path
) -> None:
    store = QuantizedModelStore(tmp_path / "cache", model)
    for name in ("ab", "cd"):
        other = QuantizedModelStore(tmp_path / name, model)
        other.store(name * 32, name.encode(), QUALITY)
        shutil.copytree(other.folder, store.folder, dirs_exist_ok=True)

    found = store.load()

    assert found is not None and found.name == store.current()
    assert found.graph == found.name[:2].encode()


def test_quantized_model_created_after_the_start_is_not_served(
    model: Model, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"device": DeviceChoice.CPU, "cache_dir": tmp_path, "threads": 2}
    store = QuantizedModelStore(tmp_path, model)
    store.store("ab" * 32, b"old", QUALITY)
    worker = open_serving(WorkerSettings(**values), model)
    store.store("cd" * 32, b"new", QUALITY)

    with pytest.raises(NotQuantized, match=f"{'ab' * 8} .*Restart the worker"):
        worker.engine_for(Accuracy.INT8)

    assert worker.model_info.quantized == "ab" * 8
    worker.close()


def test_changed_quantized_model_is_not_served(model: Model, tmp_path: Path) -> None:
    store = QuantizedModelStore(tmp_path / "cache", model)
    store.store("ab" * 32, b"graph", QUALITY)
    (blob,) = tmp_path.rglob(BLOB)

    blob.chmod(0o666)
    writable = store.load()
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"!")

    assert writable is None
    assert store.load() is None
    with pytest.raises(NotQuantized, match="embedq-worker quantize"):
        cpu_opener(model, tmp_path / "cache").open_int8()


def test_comparison_has_cosines_overlap_and_changed_lines() -> None:
    angles = np.deg2rad([0, 10, 20, 30, 170.0] * 3)
    expected = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    found = expected.copy()
    found[4] = [1, 0]  # turned by 170 degrees

    figures = compare(found, expected, list(range(100, 115)))

    assert figures["held_out_texts"] == 15
    assert figures["cosine_min"] == pytest.approx(np.cos(np.deg2rad(170)), abs=1e-4)
    assert figures["cosine_mean"] == pytest.approx((14 + np.cos(np.deg2rad(170))) / 15, abs=1e-4)
    assert 0.5 < figures["overlap"] < 1
    assert 104 in {line for line, _, _ in figures["changed"]}


def test_sample_has_distinct_usable_texts_with_line_numbers(tmp_path: Path) -> None:
    lines = [f"text {i // 2}" for i in range(200)] + ["", "  ", "nul \0"]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")

    found = sample_texts([str(tmp_path / "texts.txt")], 24, calibration=20, held_out=60)
    again = sample_texts([str(tmp_path / "texts.txt")], 24, calibration=20, held_out=60)

    chosen = [*found.calibration, *found.held_out]
    assert (len(found.calibration), len(found.held_out)) == (20, 60)
    assert len({line.text for line in chosen}) == 80
    assert all(lines[line.number - 1] == line.text for line in chosen)
    assert (found.read, found.complete) == (203, True)
    assert found == again


@pytest.mark.parametrize("content", ["", "one text\n" * 100])
def test_file_with_too_few_texts_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "texts.txt").write_text(content)

    with pytest.raises(InputError, match=f"needs at least {MIN_TEXTS}"):
        sample_texts([str(tmp_path / "texts.txt")], 24)


def test_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        sample_texts([str(tmp_path / "nowhere.txt")], 24)


def test_worker_without_a_quantized_model_refuses_int8_only(model: Model, tmp_path: Path) -> None:
    opened = cpu_opener(model, tmp_path)
    standard = opened.open_cpu(Accuracy.STANDARD)
    worker = EngineSet(model.model_info(), standard, lambda: standard, opened.open_int8)

    for _ in range(2):
        with pytest.raises(NotQuantized, match="embedq-worker quantize"):
            worker.engine_for(Accuracy.INT8)

    assert worker.engine_for(Accuracy.STANDARD) is standard
    worker.close()


def test_quantized_graph_has_vectors_close_to_the_model(model: Model, tmp_path: Path) -> None:
    if importlib.util.find_spec("nncf") is None:
        if os.environ.get("CI"):
            pytest.fail("the extra dev brings nncf")
        pytest.skip("pip install 'embedq[quantize]'")
    texts = [" ".join(WORDS[i % 5 : i % 12 + 1]) + " x" * (i % 7) for i in range(40)]
    lines = [Line(i, text) for i, text in enumerate(texts)]
    exact = cpu_opener(model, tmp_path).open_cpu(Accuracy.EXACT)

    quantized = quantize_graph(model, lines)
    engine = open_engine("openvino", model, 2, Precision.INT8, quantized.graph)
    embedder = Embedder(exact.embedder.tokenizer, engine, token_budget=512)
    found = embed_lines(embedder, model, lines, print)

    assert engine.precision is Precision.INT8
    expected = embed_lines(exact.embedder, model, lines, print)
    cosines = (found * expected).sum(axis=1)
    assert 0.9 < cosines.mean() < 0.999999
    for opened in (embedder, engine, exact):
        opened.close()
