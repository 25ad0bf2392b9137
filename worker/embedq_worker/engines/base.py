"""What every engine offers: token batches in, vectors out. No runtime is imported here."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedq.contract import Device, Precision
from embedq_worker.packing import TokenBatch


class Engine(Protocol):
    """One model on one device, ready to infer.

    Attributes:
        name: what runs the model: ``onnxruntime``, ``openvino`` or ``stub``.
        device: what it runs on.
        precision: the arithmetic it uses.
        dim: components of a vector.
        concurrency: how many callers of ``infer`` it serves well at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def device(self) -> Device: ...
    @property
    def precision(self) -> Precision: ...
    @property
    def dim(self) -> int: ...
    @property
    def concurrency(self) -> int: ...

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Turn one token batch into vectors, float32 [B, S, D]; blocks, and any thread may call.

        Raises:
            InferFailed: the inference raised.
            DeviceLost: only a new process can use the device again.
        """
        ...

    def close(self) -> None:
        """Give the device back; the engine cannot be used afterwards."""
        ...
