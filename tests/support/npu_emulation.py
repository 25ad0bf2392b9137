"""Run emulated NPUs in separate processes: a plugin is registered once per process, and may crash.

What runs there is a function of this module, so that it can be pickled.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest

from embedq.protocol.contract import Device, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq_worker.engines.base import TokenBatch
from embedq_worker.engines.openvino_runtime import TARGETS, DeviceTarget
from embedq_worker.files import DigestCache
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.serving import VerifiedEngine
from embedq_worker.inference.stats import EngineStats
from embedq_worker.model import resolve
from embedq_worker.model.resolve import Model
from embedq_worker.settings import DeviceChoice, Emulation, WorkerSettings

T = TypeVar("T")
Vectors = npt.NDArray[np.float32]

#: Source of a plugin that is the CPU plugin under the name NPU.
SHIM = Path(__file__).with_name("npu_shim.cpp")


@functools.cache
def shim_target() -> DeviceTarget:
    """Build the shim, or skip if g++ is missing."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing; Debian: apt install g++")
    spec = importlib.util.find_spec("openvino")
    assert spec and spec.submodule_search_locations
    libs = Path(spec.submodule_search_locations[0], "libs")
    folder = Path(tempfile.mkdtemp(prefix="embedq-shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library, plugins = folder / "libnpu_shim_plugin.so", folder / "plugins.xml"
    define = f'-DOV_CPU_LIB="{libs / "libopenvino_intel_cpu_plugin.so"}"'
    runtime = next(libs.glob("libopenvino.so.*"))
    options = ("-std=c++17", "-O1", "-shared", "-fPIC", define)
    command = [compiler, *options, str(SHIM), str(runtime), "-ldl", "-o", str(library)]
    subprocess.run(command, check=True)
    plugins.write_text(f'<ie><plugins><plugin name="NPU" location="{library}"/></plugins></ie>')
    return DeviceTarget(plugins=str(plugins), emulation="shim")


def target_of(name: str) -> DeviceTarget:
    return shim_target() if name == "shim" else TARGETS[name]


class EngineProcess:
    """A process that runs functions of this module, one at a time."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the process; return its result or raise its exception."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        self._pool.shutdown()

    def kill(self) -> None:
        """End the process, even if an inference hangs in it."""
        for each in self._pool._processes.values():
            each.kill()
        self._pool.shutdown()


@contextmanager
def engine_process() -> Iterator[EngineProcess]:
    opened = EngineProcess()
    try:
        yield opened
    finally:
        opened.kill()


class RemoteEngine:
    """An engine whose emulated NPU is in another process."""

    name, device = "openvino", Device.NPU
    concurrency = 1

    def __init__(
        self, process: EngineProcess, target: DeviceTarget, model: Model, cache: Path
    ) -> None:
        self._process = process
        engine = process.call(open_npu, target, model.folder, cache, {})
        self.dim, self.precision = engine["dim"], engine["precision"]
        self.row_spec = engine["row_spec"]
        self.details: Mapping[str, str] = MappingProxyType(engine["details"])

    def infer(self, batch: TokenBatch) -> Vectors:
        return self._process.call(infer_batch, batch)

    def close(self) -> None:
        self._process.close()


# -- functions that run in an EngineProcess -------------------------------------------------------

_opened: dict[str, Any] = {}


def npu_settings(cache: Path, **settings: Any) -> WorkerSettings:
    values = {"device": DeviceChoice.NPU, "npu_emulation": Emulation.ALIAS, "cache_dir": cache}
    return WorkerSettings(**{**values, **settings})


def open_npu(
    target: DeviceTarget, folder: Path, cache: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Open and verify an emulated NPU as a worker does, and describe the engine."""
    import embedq_worker.engines.openvino_runtime as targets

    # The setting has no value for the shim, so it replaces `alias`.
    targets.TARGETS = {**TARGETS, "alias": target}  # type: ignore[misc]
    model = resolve.load_model(folder, "model", DigestCache(cache))
    started = time.monotonic()
    verified = EngineOpener(npu_settings(cache, **settings), model).open_npu()
    _opened.update(verified=verified, model=model)
    engine = verified.engine
    return {
        "dim": engine.dim,
        "precision": engine.precision,
        "row_spec": engine.row_spec,
        "details": dict(engine.details),
        "report": verified.report,
        "seconds": time.monotonic() - started,
        "modules": [n for n in ("onnx", "onnxruntime") if n in __import__("sys").modules],
    }


def infer_batch(batch: TokenBatch) -> Vectors:
    verified: VerifiedEngine = _opened["verified"]
    return verified.engine.infer(batch)


def embed_texts(texts: list[str]) -> tuple[Vectors, EngineStats, dict[str, int]]:
    """Embed texts with a canary per batch; return vectors, statistics and the engine's counters."""
    verified: VerifiedEngine = _opened["verified"]
    stats = EngineStats()
    vectors, _ = verified.embedder.embed(batch_of(texts, _opened["model"]), stats)
    return vectors, stats, asdict(verified.engine.counters())  # type: ignore[attr-defined]


def embed_from_threads(texts: list[str], callers: int) -> list[Vectors]:
    verified: VerifiedEngine = _opened["verified"]
    batch = batch_of(texts, _opened["model"])
    with ThreadPoolExecutor(callers) as pool:
        return [found[0] for found in pool.map(verified.embedder.embed, [batch] * callers)]


def batch_of(texts: list[str], model: Model) -> EmbedBatch:
    return EmbedBatch("job", 0, texts, VectorSpec(model.identity, model.dim, model.max_length))


# -- faults --------------------------------------------------------------------------------------

#: Kind of fault, and the number of inferences before it.
_fault: dict[str, Any] = {"kind": "", "after": 0}

#: Message of the plugin for a lost device.
LOST = (
    "zero_wrappers.cpp:382: L0 zeFenceHostSynchronize result: ZE_RESULT_ERROR_DEVICE_LOST, code "
    "0x70000001 - device hung, reset, was removed, or driver update occurred"
)


def open_faulty_npu(
    target: DeviceTarget, folder: Path, cache: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Open an emulated NPU whose graph ends with an operator that injects faults.

    An operator in Python cannot be exported, so the model is compiled in this process.
    """
    from embedq_worker.engines.compiler import CompiledModelLoader
    from embedq_worker.model.graph import build_graph

    def load(self: Any, shapes: Mapping[str, list[int]], timeout_s: float) -> Any:
        graph = build_graph(self._model)
        core = self._runtime._core
        read = core.read_model
        self._runtime._core = _FaultInsertingCore(core, read)
        return self._runtime.compile(graph, self._properties, shapes)

    CompiledModelLoader.load = load  # type: ignore[method-assign]
    return open_npu(target, folder, cache, settings)


class _FaultInsertingCore:
    """An OpenVINO core that inserts the fault operator before the result of each model."""

    def __init__(self, core: Any, read: Callable[[bytes], Any]) -> None:
        self._core, self._read = core, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def read_model(self, graph: bytes) -> Any:
        model = self._read(graph)
        result = model.get_results()[0]
        source = result.input_value(0)
        fault = _operator()([source])
        fault.output(0).get_tensor().set_names({"vectors"})
        source.get_tensor().set_names(set())
        result.input(0).replace_source_output(fault.output(0))
        return model


@functools.cache
def _operator() -> Any:
    import openvino as ov

    class Fault(ov.Op):  # type: ignore[misc] # openvino has no types
        def __init__(self, inputs: Any = None) -> None:
            super().__init__(self)
            if inputs is not None:
                self.set_arguments(inputs)
                self.constructor_validate_and_infer_types()

        def validate_and_infer_types(self) -> None:
            kind, shape = self.get_input_element_type(0), self.get_input_partial_shape(0)
            self.set_output_type(0, kind, shape)

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return Fault(inputs)

        def has_evaluate(self) -> bool:
            return True

        def evaluate(self, outputs: Any, inputs: Any) -> bool:
            inputs[0].copy_to(outputs[0])
            _inject_fault(outputs[0].data)
            return True

    return Fault


def _inject_fault(vectors: Any) -> None:
    if not _fault["kind"]:
        return
    _fault["after"] -= 1
    if _fault["after"] >= 0:
        return
    kind = _fault["kind"]
    if kind == "nan":
        vectors[:] = np.nan
    elif kind == "wrong":
        vectors[:] = np.roll(vectors, 1, axis=-1)
    elif kind == "lost":
        raise RuntimeError(LOST)
    elif kind == "error":
        raise RuntimeError("an unknown error")
    elif kind == "hang":
        time.sleep(60)


def arm_fault(kind: str, after: int = 0) -> None:
    """Inject a fault into every inference after the next `after` ones."""
    _fault.update(kind=kind, after=after)


def close_npu() -> None:
    """Close the engine, as a worker does before it exits."""
    verified: VerifiedEngine = _opened["verified"]
    verified.close()
