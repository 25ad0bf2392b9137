"""fp32 on the CPU through onnxruntime: the fallback everywhere, and the reference of the others.

The only file that imports ``onnxruntime``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from embedq.protocol.contract import Device, Precision
from embedq_worker.engines.base import RowSpec, TokenBatch, available_cores
from embedq_worker.errors import CompileFailed, InferFailed
from embedq_worker.model.bert import build_graph
from embedq_worker.model.onnx_graph import OnnxModel
from embedq_worker.model.resolve import Model


class OnnxRuntimeEngine:
    """One session, called from as many threads as it may use cores."""

    name = "onnxruntime"
    device = Device.CPU
    precision = Precision.F32
    row_spec = RowSpec()

    def __init__(self, model: Model, threads: int = 0, streams: int = 0) -> None:
        """Build the graph and load it.

        Args:
            model: what to serve.
            threads: cores to use, 0 for all this process may use.
            streams: inferences at a time, 0 for one per core; the cores are shared among them.

        Raises:
            ModelError: the files of the model are damaged.
            CompileFailed: onnxruntime refuses the graph.
        """
        self.dim = model.dim
        cores = threads or available_cores()
        self.concurrency = min(streams or cores, cores)
        self.details = {"streams": str(self.concurrency)}
        graph = build_graph(model)
        # The session reads the graph's weights in place, so they live as long as it does.
        self._opened: tuple[ort.InferenceSession, OnnxModel] | None = (
            _open(graph, model.label, cores // self.concurrency),
            graph,
        )

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Turn one token batch into vectors, float32 [B, S, D].

        Raises:
            InferFailed: onnxruntime raised, or the engine is closed.
        """
        opened = self._opened
        if opened is None:
            raise InferFailed("The onnxruntime engine is closed.")
        feed = {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "segment_ids": batch.segment_ids,
            "segments": batch.segments,
        }
        try:
            vectors: npt.NDArray[np.float32] = opened[0].run(["vectors"], feed)[0]
        except Exception as error:
            raise InferFailed(f"onnxruntime: {error}") from error
        if vectors.shape != (*batch.members.shape, self.dim):
            raise InferFailed(f"onnxruntime gave shape {vectors.shape} for {batch.members.shape}.")
        return vectors

    def close(self) -> None:
        """Free the session and the weights that it reads in place."""
        self._opened = None


def _open(graph: OnnxModel, label: str, threads: int) -> ort.InferenceSession:
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    # One thread inside an inference and one caller per core. Two threads inside and one caller
    # were no faster: 7,700 to 8,600 tokens a second against 7,700 to 7,800 at 1,024 and 2,048
    # tokens an inference, and far slower in the one run at 8 texts of 64 (two Zen 4 cores that
    # others used too, all-MiniLM-L6-v2). This way 512 tokens an inference did best in each of
    # three runs: 83, 66 and 68 docs/s against 75, 57 and 65 at 2,048 (docstrings of 90 tokens).
    # Measured 2026-11-22.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The arena stays on: off, 60 batches of mixed shapes took 7 to 10 % more CPU and peaked at
    # 420 MB instead of 342 (2 runs each, measured 2026-11-22).
    options.enable_cpu_mem_arena = True
    options.log_severity_level = 3
    values = [ort.OrtValue.ortvalue_from_numpy(weight) for weight in graph.weights.values()]
    try:
        options.add_external_initializers(list(graph.weights), values)
        return ort.InferenceSession(
            graph.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own classes have no common parent of their own
        raise CompileFailed(f"onnxruntime refuses {label}: {error}") from error
