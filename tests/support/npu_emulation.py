"""Emulated NPUs for an NPU, each in a process of its own: there a plugin is registered, and may
die.

What is run over there is a function of this file, so that both processes know it.
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


#: The CPU plugin under the name NPU.
SHIM = Path(__file__).with_name("npu_shim.cpp")


@functools.cache
def shim_target() -> DeviceTarget:
    """Build the shim, or skip and say why."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is missing; Debian: apt install g++")
    spec = importlib.util.find_spec("openvino")
    assert spec and spec.submodule_search_locations
    libs = Path(spec.submodule_search_locations[0], "libs")
    folder = Path(tempfile.mkdtemp(prefix="embedq-shim-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library, plugins = folder / "libnpu_standin_plugin.so", folder / "plugins.xml"
    define = f'-DOV_CPU_LIB="{libs / "libopenvino_intel_cpu_plugin.so"}"'
    runtime = next(libs.glob("libopenvino.so.*"))
    options = ("-std=c++17", "-O1", "-shared", "-fPIC", define)
    command = [compiler, *options, str(SHIM), str(runtime), "-ldl", "-o", str(library)]
    subprocess.run(command, check=True)
    plugins.write_text(f'<ie><plugins><plugin name="NPU" location="{library}"/></plugins></ie>')
    return DeviceTarget(plugins=str(plugins), emulation="shim")


def target_of(name: str) -> DeviceTarget:
    """Return the target of an emulated NPU."""
    return shim_target() if name == "shim" else TARGETS[name]


class Process:
    """A process that runs functions of this file, one at a time."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function over there and return what it returns, or raise what it raises."""
        return self._pool.submit(function, *arguments).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()

    def kill(self) -> None:
        """End the process although an inference hangs in it."""
        for each in self._pool._processes.values():
            each.kill()
        self._pool.shutdown()


@contextmanager
def process() -> Iterator[Process]:
    """Run a process for as long as the block lasts."""
    opened = Process()
    try:
        yield opened
    finally:
        opened.kill()


class RemoteEngine:
    """An engine that lives in an emulated NPU's process and is asked from here."""

    name, device = "openvino", Device.NPU
    concurrency = 1

    def __init__(self, there: Process, target: DeviceTarget, model: Model, cache: Path) -> None:
        self._there = there
        shown = there.call(open_there, target, model.folder, cache, {})
        self.dim, self.precision, self.form = shown["dim"], shown["precision"], shown["form"]
        self.details: Mapping[str, str] = MappingProxyType(shown["details"])

    def infer(self, batch: TokenBatch) -> Vectors:
        return self._there.call(infer_there, batch)

    def close(self) -> None:
        self._there.close()


# -- what runs over there ------------------------------------------------------------------------

_opened: dict[str, Any] = {}


def settings_there(cache: Path, **settings: Any) -> WorkerSettings:
    """Return settings of a worker on an NPU."""
    values = {"device": DeviceChoice.NPU, "npu_emulation": Emulation.ALIAS, "cache_dir": cache}
    return WorkerSettings(**{**values, **settings})


def open_there(
    target: DeviceTarget, folder: Path, cache: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Open and prove an emulated NPU as a worker does, and say what it is."""
    import embedq_worker.engines.openvino_runtime as targets

    # The shim has no name among the settings: it goes in the alias' place.
    targets.TARGETS = {**TARGETS, "alias": target}  # type: ignore[misc]
    model = resolve.load_model(folder, "model", DigestCache(cache))
    began = time.monotonic()
    proven = EngineOpener(settings_there(cache, **settings), model).open_npu()
    _opened.update(proven=proven, model=model)
    engine = proven.engine
    return {
        "dim": engine.dim,
        "precision": engine.precision,
        "form": engine.form,
        "details": dict(engine.details),
        "report": proven.report,
        "seconds": time.monotonic() - began,
        "modules": [n for n in ("onnx", "onnxruntime") if n in __import__("sys").modules],
    }


def infer_there(batch: TokenBatch) -> Vectors:
    """Infer one token batch."""
    proven: VerifiedEngine = _opened["proven"]
    return proven.engine.infer(batch)


def embed_there(texts: list[str]) -> tuple[Vectors, EngineStats, dict[str, int]]:
    """Embed texts through the embedder, canary and all; with what it cost, and the counters."""
    proven: VerifiedEngine = _opened["proven"]
    stats = EngineStats()
    vectors, _ = proven.embedder.embed(batch_of(texts, _opened["model"]), stats)
    return vectors, stats, asdict(proven.engine.counters())  # type: ignore[attr-defined]


def embed_from_threads(texts: list[str], callers: int) -> list[Vectors]:
    """Embed the same texts from several threads at once."""
    proven: VerifiedEngine = _opened["proven"]
    batch = batch_of(texts, _opened["model"])
    with ThreadPoolExecutor(callers) as pool:
        return [found[0] for found in pool.map(proven.embedder.embed, [batch] * callers)]


def batch_of(texts: list[str], model: Model) -> EmbedBatch:
    """Make a batch of texts."""
    return EmbedBatch("job", 0, texts, VectorSpec(model.identity, model.dim, model.max_length))


# -- faults --------------------------------------------------------------------------------------

#: What the last operator of the graph does to its n-th inference from now on.
_fault: dict[str, Any] = {"kind": "", "after": 0}


#: What the plugin said of a lost device.
LOST = (
    "zero_wrappers.cpp:382: L0 zeFenceHostSynchronize result: ZE_RESULT_ERROR_DEVICE_LOST, code "
    "0x70000001 - device hung, reset, was removed, or driver update occurred"
)


def open_faulty_there(
    target: DeviceTarget, folder: Path, cache: Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Open an emulated NPU as open_there, with an operator in its graph that can be told to fail.

    An operator in Python cannot be exported, so the model is compiled here and not in a child.
    """
    from embedq_worker.engines.compiler import CompiledModelLoader
    from embedq_worker.model.bert import build_graph

    def load(self: Any, shapes: Mapping[str, list[int]], deadline_s: float) -> Any:
        graph = build_graph(self._model)
        core = self._runtime._core
        read = core.read_model
        self._runtime._core = _Inserting(core, read)
        return self._runtime.compile(graph, self._properties, shapes)

    CompiledModelLoader.load = load  # type: ignore[method-assign]
    return open_there(target, folder, cache, settings)


class _Inserting:
    """A core that puts the operator before the result of each model it reads."""

    def __init__(self, core: Any, read: Callable[[bytes], Any]) -> None:
        self._core, self._read = core, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def read_model(self, graph: bytes) -> Any:
        """Read a model and insert the operator."""
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
            _misbehave(outputs[0].data)
            return True

    return Fault


def _misbehave(vectors: Any) -> None:
    """Do what was asked for, in the n-th inference from when it was and in all later ones."""
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
        raise RuntimeError("something that nobody has seen before")
    elif kind == "hang":
        time.sleep(60)


def arm_there(kind: str, after: int = 0) -> None:
    """Tell the operator what to do, and to which inference from now on first."""
    _fault.update(kind=kind, after=after)


def exit_there() -> None:
    """End the process in good order: close the engine, as a worker does."""
    proven: VerifiedEngine = _opened["proven"]
    proven.close()
