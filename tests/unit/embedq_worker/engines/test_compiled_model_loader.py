"""Tests of loading compiled models from the cache or the compiler process."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from embedq_worker.engines import compiler as loading
from embedq_worker.engines.base import Bytes, RowSpec
from embedq_worker.engines.compiler import (
    CompiledModelLoader,
    CompileRequest,
    compile_in_subprocess,
    shapes_of,
)
from embedq_worker.engines.openvino_errors import compile_failed
from embedq_worker.engines.openvino_npu import open_npu
from embedq_worker.engines.openvino_runtime import CPU, Runtime
from embedq_worker.errors import CompileFailed, FailureReason, NoDevice
from embedq_worker.model import graph
from embedq_worker.model.resolve import Model
from embedq_worker.settings import WorkerSettings

FORM = RowSpec.packed(24)
SHAPES = shapes_of(FORM, 24)
SEGFAULT = (
    "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
    "os.kill(os.getpid(), signal.SIGSEGV)"
)


class CountingCompiler:
    """Compiles the graph in this process and counts the calls."""

    def __init__(self, model: Model) -> None:
        self.calls = 0
        self._graph = graph.build_graph(model)

    def __call__(self, job: CompileRequest, timeout_s: float) -> Bytes:
        self.calls += 1
        blob = Runtime(CPU).compile(self._graph, job.properties, job.shapes).export()
        return np.frombuffer(bytearray(blob), np.uint8)


def loader(model: Model, cache: Path, compiler: loading.CompileFunction) -> CompiledModelLoader:
    """Return a loader for OpenVINO's CPU device."""
    return CompiledModelLoader(Runtime(CPU), model, {}, cache, compiler)


def test_model_is_compiled_once(model: Model, tmp_path: Path) -> None:
    compiler = CountingCompiler(model)

    for _ in range(2):
        loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.calls == 1


def test_blob_refused_by_the_plugin_is_compiled_again(model: Model, tmp_path: Path) -> None:
    compiler = CountingCompiler(model)
    opened = loader(model, tmp_path, compiler)
    garbage = np.arange(10_000, dtype=np.uint8)
    opened.store.store(opened._key(SHAPES), garbage)

    opened.load(SHAPES, 10.0).create_request()
    loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.calls == 1


@pytest.mark.parametrize("result", ["DEVICE_LOST", "OUT_OF_DEVICE_MEMORY"])
def test_device_error_during_import_does_not_delete_the_blob(
    result: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = CountingCompiler(model)
    loader(model, tmp_path, compiler).load(SHAPES, 10.0)

    def raise_device_error(*_: object) -> None:
        raise compile_failed(f"L0 pfnCreate2 result: ZE_RESULT_ERROR_{result}", "Importing")

    with monkeypatch.context() as patched, pytest.raises(CompileFailed, match=result):
        patched.setattr(Runtime, "import_blob", raise_device_error)
        loader(model, tmp_path, compiler).load(SHAPES, 10.0)
    loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.calls == 1


def test_truncated_blob_is_compiled_again(model: Model, tmp_path: Path) -> None:
    compiler = CountingCompiler(model)
    opened = loader(model, tmp_path, compiler)
    opened.load(SHAPES, 10.0)
    (path,) = opened.store.folder.glob("*/model.blob")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)

    loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.calls == 2


def test_unusable_cache_folder_means_a_compile_per_load(model: Model, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    compiler = CountingCompiler(model)

    for _ in range(2):
        loader(model, tmp_path / "cache", compiler).load(SHAPES, 10.0).create_request()

    assert compiler.calls == 2


def test_crashed_compiler_leaves_neither_blob_nor_lock(model: Model, tmp_path: Path) -> None:
    crash = functools.partial(compile_in_subprocess, command=[sys.executable, "-c", SEGFAULT])
    with pytest.raises(CompileFailed, match="SIGSEGV") as caught:
        loader(model, tmp_path, crash).load(SHAPES, 30.0)

    compiler = CountingCompiler(model)
    loader(model, tmp_path, compiler).load(SHAPES, 30.0).create_request()

    assert caught.value.reason is FailureReason.COMPILE_CRASHED
    assert compiler.calls == 1


def test_missing_npu_error_lists_the_available_devices(model: Model, tmp_path: Path) -> None:
    if "NPU" in Runtime(CPU)._core.available_devices:
        pytest.skip("this machine has an NPU")

    with pytest.raises(NoDevice, match="CPU"):
        open_npu(model, WorkerSettings.load(device="npu", cache_dir=tmp_path))
