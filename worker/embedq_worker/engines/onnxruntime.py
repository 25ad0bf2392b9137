"""Run a model in f32 on the CPU through onnxruntime. No other module imports ``onnxruntime``.

This engine is the fallback on every machine and the reference for the vectors of the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from embedq.protocol.contract import Device, Precision
from embedq_worker.engines.base import INPUTS, RowSpec, TokenBatch, coarser
from embedq_worker.errors import CompileFailed, InferFailed
from embedq_worker.model.graph import build_graph
from embedq_worker.model.onnx_graph import WEIGHTS_LOCATION, OnnxModel
from embedq_worker.model.resolve import Model

#: Session option: folder of the files with external weights.
EXTERNAL_FOLDER: Final = "session.model_external_initializers_file_folder_path"


class OnnxRuntimeEngine:
    """An engine with one session that several threads call concurrently."""

    name = "onnxruntime"
    device = Device.CPU
    row_spec = RowSpec()

    def __init__(self, model: Model, threads: int, streams: int = 0) -> None:
        """Build the graph and load it.

        Args:
            model: model to load.
            threads: number of cores.
            streams: number of concurrent inferences, which share the cores; 0 for one per core.

        Raises:
            ModelError: the files of the model are damaged.
            CompileFailed: onnxruntime rejects the graph.
        """
        self.dim = model.dim
        self.precision = coarser(Precision.F32, model.weights_precision)
        self.concurrency = min(streams or threads, threads)
        self.details: Mapping[str, str] = {"streams": str(self.concurrency)}
        graph = build_graph(model)
        # The session reads the weights in place, so they must live as long as the session.
        values = {
            name: ort.OrtValue.ortvalue_from_numpy(weight)
            for name, weight in ({} if graph.mapping else graph.weights).items()
        }
        session = _open(graph, values, model.label, threads // self.concurrency)
        self._opened: tuple[ort.InferenceSession, OnnxModel, object] | None = (
            session,
            graph,
            values,
        )

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Compute the vectors of one token batch, float32 [B, S, D].

        Raises:
            InferFailed: onnxruntime raised an error, or the engine is closed.
        """
        opened = self._opened
        if opened is None:
            raise InferFailed("The onnxruntime engine is closed.")
        feed = {name: getattr(batch, name) for name in INPUTS}
        try:
            vectors: npt.NDArray[np.float32] = opened[0].run(["vectors"], feed)[0]
        except Exception as error:
            raise InferFailed(f"onnxruntime failed: {error}") from error
        members = batch.members.shape
        if vectors.shape != (*members, self.dim):
            raise InferFailed(f"onnxruntime returned shape {vectors.shape} for {members}.")
        return vectors

    def close(self) -> None:
        """Free the session and its weights."""
        self._opened = None


def _open(
    graph: OnnxModel, values: Mapping[str, ort.OrtValue], label: str, threads: int
) -> ort.InferenceSession:
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    # By default one thread per inference and one caller per core: more threads per inference are
    # no faster for large batches and slower for small ones.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Without the arena, batches of mixed shapes need more CPU time and more memory.
    options.enable_cpu_mem_arena = True
    options.log_severity_level = 3
    try:
        if graph.mapping:
            # onnxruntime maps the files itself.
            return _create(graph, options, graph.mapping.folder)
        for name, value in values.items():
            options.add_initializer(name, value)  # add_external_initializers would copy it
        with tempfile.TemporaryDirectory(prefix="embedq-") as folder:
            # The file that the message names must exist. It is empty: reading it is an error.
            Path(folder, WEIGHTS_LOCATION).touch()
            return _create(graph, options, Path(folder))
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise CompileFailed(f"onnxruntime rejects {label}: {error}") from error


def _create(graph: OnnxModel, options: ort.SessionOptions, folder: Path) -> ort.InferenceSession:
    options.add_session_config_entry(EXTERNAL_FOLDER, str(folder.resolve()))
    return ort.InferenceSession(
        graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
