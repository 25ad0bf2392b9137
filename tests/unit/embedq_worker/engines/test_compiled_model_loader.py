"""Compiled models come from the cache or from a child; what is in doubt is compiled again."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

from embedq_worker.engines import compiler as loading
from embedq_worker.engines import model_cache
from embedq_worker.engines.base import RowSpec
from embedq_worker.engines.compiler import (
    CompiledModelLoader,
    CompileRequest,
    compile_in_child,
    shapes_of,
)
from embedq_worker.engines.model_cache import Bytes
from embedq_worker.engines.openvino_errors import compile_failed
from embedq_worker.engines.openvino_npu import NpuOptions, open_npu
from embedq_worker.engines.openvino_runtime import CPU, DeviceTarget, Runtime
from embedq_worker.errors import CompileFailed, FailureReason, NoDevice
from embedq_worker.model import bert
from embedq_worker.model.resolve import Model

FORM = RowSpec.packed(24)
SHAPES = shapes_of(FORM, 24)
SEGFAULT = (
    "import os, resource, signal; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "
    "os.kill(os.getpid(), signal.SIGSEGV)"
)


class Compiler:
    """Compiles the graph here, as a child would, and counts how often."""

    def __init__(self, model: Model) -> None:
        self.asked = 0
        self._graph = bert.build_graph(model)

    def __call__(self, job: CompileRequest, deadline_s: float) -> Bytes:
        self.asked += 1
        blob = Runtime(CPU).compile(self._graph, job.properties, job.shapes).export()
        return np.frombuffer(bytearray(blob), np.uint8)


def loader(model: Model, cache: Path, compiler: loading.Compile) -> CompiledModelLoader:
    """Make a loader for the CPU, which is a device of its own name."""
    return CompiledModelLoader(Runtime(CPU), model, {}, cache, compiler)


def test_model_is_compiled_once(model: Model, tmp_path: Path) -> None:
    """The second load imports what the first one kept."""
    compiler = Compiler(model)

    for _ in range(2):
        loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.asked == 1


def test_blob_that_the_plugin_refuses_is_compiled_again(model: Model, tmp_path: Path) -> None:
    """As after an update of a driver that does not change its version: discarded, made anew."""
    compiler = Compiler(model)
    opened = loader(model, tmp_path, compiler)
    garbage = np.arange(10_000, dtype=np.uint8)
    opened.store.store(opened._key(SHAPES), garbage)

    opened.load(SHAPES, 10.0).create_request()
    loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.asked == 1


@pytest.mark.parametrize("result", ["DEVICE_LOST", "OUT_OF_DEVICE_MEMORY"])
def test_device_that_is_gone_costs_no_blob(
    result: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says nothing about what it was to import, and could not compile anything else."""
    compiler = Compiler(model)
    loader(model, tmp_path, compiler).load(SHAPES, 10.0)

    def gone(*_: object) -> None:
        raise compile_failed(f"L0 pfnCreate2 result: ZE_RESULT_ERROR_{result}", "Importing")

    with monkeypatch.context() as patched, pytest.raises(CompileFailed, match=result):
        patched.setattr(Runtime, "import_blob", gone)
        loader(model, tmp_path, compiler).load(SHAPES, 10.0)
    loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.asked == 1


def test_truncated_blob_is_compiled_again(model: Model, tmp_path: Path) -> None:
    """Half a file is not trusted."""
    compiler = Compiler(model)
    opened = loader(model, tmp_path, compiler)
    opened.load(SHAPES, 10.0)
    (path,) = opened.store.folder.glob("*/model.blob")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)

    loader(model, tmp_path, compiler).load(SHAPES, 10.0).create_request()

    assert compiler.asked == 2


def test_cache_that_is_not_ours_does_not_stop_a_worker(model: Model, tmp_path: Path) -> None:
    """Without a usable folder the model is compiled at each start, and serves."""
    (tmp_path / "cache").write_text("in the way")
    compiler = Compiler(model)

    for _ in range(2):
        loader(model, tmp_path / "cache", compiler).load(SHAPES, 10.0).create_request()

    assert compiler.asked == 2


def test_crashed_compiler_leaves_nothing_behind(model: Model, tmp_path: Path) -> None:
    """A segfault in the child is an error here, keeps no blob, and holds no lock."""
    crash = functools.partial(compile_in_child, command=[sys.executable, "-c", SEGFAULT])
    with pytest.raises(CompileFailed, match="SIGSEGV") as caught:
        loader(model, tmp_path, crash).load(SHAPES, 30.0)

    compiler = Compiler(model)
    loader(model, tmp_path, compiler).load(SHAPES, 30.0).create_request()

    assert caught.value.reason is FailureReason.COMPILE_CRASHED
    assert compiler.asked == 1


def test_missing_device_is_told(model: Model, tmp_path: Path) -> None:
    """Without an NPU the error says what OpenVINO does see."""
    if "NPU" in Runtime(CPU)._core.available_devices:
        pytest.skip("this machine has an NPU")

    with pytest.raises(NoDevice, match="CPU"):
        open_npu(model, NpuOptions(DeviceTarget()), tmp_path)


def test_version_of_the_graph_is_part_of_the_name() -> None:
    """The number that names blobs is the graph's own, which is not imported for its weight."""
    assert model_cache.GRAPH_VERSION == bert.GRAPH_VERSION
