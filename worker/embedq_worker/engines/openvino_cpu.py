"""Run a model on the CPU through OpenVINO, with dynamic batches and one stream per core."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from embedq.protocol.contract import Device, Precision
from embedq_worker.engines import openvino_runtime
from embedq_worker.engines.base import RowSpec, TokenBatch, coarser, correct_rounding
from embedq_worker.engines.infer_requests import OUTPUT
from embedq_worker.engines.openvino_errors import infer_failed
from embedq_worker.engines.openvino_runtime import CPU, Compiled, Runtime
from embedq_worker.errors import CompileFailed, FailureReason, InferFailed
from embedq_worker.model.graph import build_graph
from embedq_worker.model.resolve import Model

#: Precisions that this engine supports.
PRECISIONS = (Precision.F32, Precision.BF16, Precision.INT8)


class OpenVinoCpuEngine:
    """An engine with one compiled model and one infer request per stream."""

    name = "openvino"
    device = Device.CPU

    def __init__(
        self,
        model: Model,
        precision: Precision,
        threads: int,
        quantized: bytes | None = None,
        streams: int = 0,
    ) -> None:
        """Build the graph and compile it.

        Args:
            model: model to load.
            precision: ``f32``, ``bf16`` or ``int8``.
            threads: number of cores.
            quantized: graph for ``int8``; its other operators compute in bf16 or f32.
            streams: number of concurrent inferences, 0 for one per core.

        Raises:
            ModelError: the files of the model are damaged.
            CompileFailed: OpenVINO rejects the model, or this CPU does not support the precision.
        """
        self.dim = model.dim
        self.precision = coarser(precision, model.weights_precision)
        self.row_spec = RowSpec.shared(model.max_length) if model.packable else RowSpec()
        streams = min(streams or threads, threads)
        self.concurrency = streams
        self.details: Mapping[str, str] = {
            "openvino": openvino_runtime.VERSION,
            "streams": str(streams),
        }
        self._normalize = model.normalize and precision is not Precision.F32
        self._compiled: Compiled | None = _compile(model, precision, threads, quantized, streams)
        self._free: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(streams):
            self._free.put(self._compiled.create_request())

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Compute the vectors of one token batch, float32 [B, S, D].

        Raises:
            InferFailed: OpenVINO raised an error, or the engine is closed.
        """
        compiled = self._compiled
        if compiled is None:
            raise InferFailed("The openvino engine is closed.")
        names = compiled.inputs
        request = self._free.get()
        try:
            request.infer({name: getattr(batch, name) for name in names}, share_inputs=True)
            vectors = np.array(request.get_tensor(OUTPUT).data, np.float32)
        except RuntimeError as error:
            raise infer_failed(error) from error
        finally:
            self._free.put(request)
        if vectors.shape != (*batch.members.shape, self.dim):
            raise InferFailed(f"openvino returned shape {vectors.shape} for {batch.members.shape}.")
        return correct_rounding(vectors) if self._normalize else vectors

    def close(self) -> None:
        """Free the model."""
        self._compiled = None
        while not self._free.empty():
            self._free.get_nowait()


def _compile(
    model: Model, precision: Precision, threads: int, quantized: bytes | None, streams: int
) -> Compiled:
    if precision not in PRECISIONS or (precision is Precision.INT8) != (quantized is not None):
        raise CompileFailed(
            f"OpenVINO on the CPU computes in f32, in bf16, or in int8 with a quantized model, "
            f"not in {precision}. Set EMBEDQ_PRECISION to auto.",
            FailureReason.COMPILE_REFUSED,
        )
    runtime = Runtime(CPU)
    has_bf16 = "BF16" in runtime.get("OPTIMIZATION_CAPABILITIES")
    if precision is Precision.BF16 and not has_bf16:
        # OpenVINO would emulate bf16, which is much slower than f32.
        raise CompileFailed(
            "This CPU has no bf16. Set EMBEDQ_PRECISION to auto or f32.",
            FailureReason.COMPILE_REFUSED,
        )
    hint = str(precision)
    if quantized is not None:
        # Precision of the operators that are not quantized.
        hint = "bf16" if has_bf16 else "f32"
    wanted = {
        "INFERENCE_PRECISION_HINT": hint,
        # Many small inferences, one stream per core by default, are faster than few large ones.
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": str(threads),
        # With pinning, two workers on one machine would use the same cores.
        "ENABLE_CPU_PINNING": "NO",
    }
    properties = {key: value for key, value in wanted.items() if key in runtime.supported}
    graph = build_graph(model) if quantized is None else quantized
    compiled = runtime.compile(graph, properties)
    found = compiled.get("INFERENCE_PRECISION_HINT")
    if found != hint:
        raise CompileFailed(
            f"OpenVINO compiled for {found or 'an unknown precision'} instead of {hint}. "
            "Set EMBEDQ_PRECISION to auto or f32.",
            FailureReason.COMPILE_REFUSED,
        )
    return compiled
