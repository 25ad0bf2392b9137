"""Open an engine by name.

The engines of the CPU and the stub, chosen by name; only the chosen runtime is imported.
"""

from __future__ import annotations

import difflib
from typing import Final

from embedq.errors import SettingsError
from embedq.protocol.contract import Precision
from embedq_worker.engines.base import Engine, available_cores
from embedq_worker.model.resolve import Model

__all__ = ["ENGINES", "Engine", "open_engine"]


#: Names that open_engine knows.
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
        model: the model to load; only the stub does without.
        threads: cores to use, 0 for all this process may use.
        precision: the arithmetic; onnxruntime and the stub know one only.
        quantized: the graph for ``int8``.
        streams: inferences at a time, 0 for one per core.

    Raises:
        SettingsError: no engine has this name, or it needs a model and got none.
        ModelError: the files of the model are damaged.
        CompileFailed: the runtime refuses the model.
    """
    # Imported where chosen: a runtime costs 0.15 s that the stub does not need.
    if name == "stub":
        from embedq_worker.engines.stub import StubEngine

        return StubEngine(model.dim) if model else StubEngine()
    if name not in ENGINES:
        close = difflib.get_close_matches(name, ENGINES, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise SettingsError(f"Engine: expected one of {', '.join(ENGINES)}, got {name}.{hint}")
    if model is None:
        raise SettingsError(f"Engine {name} needs a model; only the stub does without.")
    if name == "openvino":
        from embedq_worker.engines.openvino_cpu import OpenVinoCpuEngine

        return OpenVinoCpuEngine(model, precision, threads or available_cores(), quantized, streams)
    from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(model, threads, streams)
