"""Open a CPU or stub engine by name, importing only the runtime that it needs."""

from __future__ import annotations

import difflib
from typing import Final

from embedq.errors import SettingsError
from embedq.protocol.contract import Precision
from embedq_worker.engines.base import Engine
from embedq_worker.model.resolve import Model
from embedq_worker.settings import available_cores

#: Names that open_engine accepts.
ENGINES: Final = ("onnxruntime", "openvino", "stub")


def open_engine(
    name: str,
    model: Model | None,
    threads: int = 0,
    precision: Precision = Precision.F32,
    quantized: bytes | None = None,
    streams: int = 0,
) -> Engine:
    """Open the engine of this name on the CPU and load the model into it.

    Args:
        name: one of ENGINES.
        model: model to load; may be None for the stub only.
        threads: number of cores, 0 for all that this process may use.
        precision: arithmetic of openvino; onnxruntime and the stub compute in f32.
        quantized: graph for ``int8``.
        streams: number of concurrent inferences, 0 for one per core.

    Raises:
        SettingsError: no engine has this name, or it needs a model and got none.
        ModelError: the files of the model are damaged.
        CompileFailed: the runtime rejects the model.
    """
    # Imports are local so that no runtime is loaded that the engine does not need.
    if name == "stub":
        from embedq_worker.engines.stub import StubEngine

        return StubEngine(model.dim) if model else StubEngine()
    if name not in ENGINES:
        close = difflib.get_close_matches(name, ENGINES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingsError(f"Engine: expected one of {', '.join(ENGINES)}, got {name}.{hint}")
    if model is None:
        raise SettingsError(f"Engine {name} needs a model; only the engine stub works without.")
    threads = threads or available_cores()
    if name == "openvino":
        from embedq_worker.engines.openvino_cpu import OpenVinoCpuEngine

        return OpenVinoCpuEngine(model, precision, threads, quantized, streams)
    from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(model, threads, streams)
