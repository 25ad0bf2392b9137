"""What every engine offers: token batches in, vectors out. No runtime is imported here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from embedq.contract import Device, Precision
from embedq_worker.packing import RowForm, TokenBatch


class Engine(Protocol):
    """One model on one device, ready to infer.

    Attributes:
        name: what runs the model: ``onnxruntime``, ``openvino`` or ``stub``.
        device: what it runs on.
        precision: the arithmetic it uses.
        dim: components of a vector.
        concurrency: how many callers of ``infer`` it serves well at once.
        form: the token batches it takes.
        details: what else an operator may want to know of it, by name.
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
    @property
    def form(self) -> RowForm: ...
    @property
    def details(self) -> Mapping[str, str]: ...

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


def available_cores() -> int:
    """Count the cores this process may use; macOS has no affinity to ask."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
