"""Manage the infer requests of an NPU and count changes of their tensors.

The NPU plugin reuses its command list only while a request's tensors stay in place. So each row
is copied into the tensors that the request allocated itself, and every moved tensor is counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from embedq.protocol.values import Vectors
from embedq_worker.engines.base import CHANGING, INPUTS, TokenBatch
from embedq_worker.engines.openvino_errors import infer_failed
from embedq_worker.errors import DeviceLost, FailureReason, InferFailed

#: Output of the graph.
OUTPUT: Final = "vectors"

#: Number of requests if the plugin reports no optimum.
FALLBACK_REQUESTS: Final = 4

#: Maximum number of requests, unless EMBEDQ_NPU_REQUESTS sets more.
MAX_REQUESTS: Final = 8


class InferRequest(Protocol):
    """The part of OpenVINO's InferRequest that this module uses."""

    def get_tensor(self, name: str) -> Any: ...
    def start_async(self) -> None: ...
    def wait_for(self, timeout: int) -> bool: ...


@dataclass(slots=True)
class Counters:
    """Inferences and tensor changes since the warm-up.

    Attributes:
        inferences: completed inferences.
        pointer_changes, shape_changes, stride_changes: tensors found changed before a start.
    """

    inferences: int = 0
    pointer_changes: int = 0
    shape_changes: int = 0
    stride_changes: int = 0

    @classmethod
    def total(cls, parts: Sequence[Counters]) -> Counters:
        """Add up counters."""
        return cls(*map(sum, zip(*map(astuple, parts), strict=True))) if parts else cls()


class PinnedRequest:
    """One infer request that is always run with its own tensors; for one caller at a time."""

    def __init__(self, request: InferRequest, inputs: Collection[str] = INPUTS) -> None:
        """Map the tensors of a request.

        Args:
            request: request of a compiled model with static shapes.
            inputs: names of the model's inputs; some ONNX models have no position ids.
        """
        self.counters = Counters()
        self._request = request
        self._views: dict[str, npt.NDArray[Any]] = {
            name: request.get_tensor(name).data for name in (*inputs, OUTPUT)
        }
        self._changing = [name for name in CHANGING if name in inputs]
        if "segments" in inputs:
            self._views["segments"][:] = np.arange(1, self._views["segments"].size + 1)
        self._layouts = {name: _layout(view) for name, view in self._views.items()}

    def run(self, batch: TokenBatch, timeout_s: float) -> Vectors:
        """Infer one token batch and return vectors, float32 [1, S, D].

        Raises:
            DeviceLost: the timeout passed or the device is gone; the request is unusable now.
            InferFailed: the inference failed.
        """
        if batch.input_ids.shape != self._views["input_ids"].shape:
            raise RuntimeError(
                f"A request of shape {self._views['input_ids'].shape} received a batch of shape "
                f"{batch.input_ids.shape}. This is a bug."
            )
        try:
            self._refresh_views()
            for name in self._changing:
                np.copyto(self._views[name], getattr(batch, name))
            self._request.start_async()
            done = self._request.wait_for(max(1, int(1e3 * timeout_s)))
        except RuntimeError as error:
            raise infer_failed(error) from error
        if not done:
            raise DeviceLost(
                f"An inference did not end within {timeout_s:.1f} s.", FailureReason.DEADLINE
            )
        self.counters.inferences += 1
        # Read through a new view: if the plugin moved the output, the old view has old vectors.
        vectors: Vectors = np.array(self._request.get_tensor(OUTPUT).data, np.float32)
        return vectors

    def _refresh_views(self) -> None:
        for name, (pointer, shape, strides) in self._layouts.items():
            view = self._request.get_tensor(name).data
            found = _layout(view)
            self.counters.pointer_changes += found[0] != pointer
            self.counters.shape_changes += found[1] != shape
            self.counters.stride_changes += found[2] != strides
            self._views[name], self._layouts[name] = view, found


def _layout(view: npt.NDArray[Any]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return view.ctypes.data, view.shape, view.strides


class RequestPool:
    """The requests of one shape; a caller that finds none free waits for one."""

    def __init__(self, slots: Sequence[PinnedRequest]) -> None:
        self._slots: Sequence[PinnedRequest] = tuple(slots)
        self._free = list(slots)
        self._changed = threading.Condition()
        self._fault: DeviceLost | None = None
        self._closed = False

    @property
    def lost(self) -> bool:
        """Say whether the device was lost, so that only a new process can use it."""
        return self._fault is not None

    def counters(self) -> Counters:
        """Return the sum of the requests' counters."""
        return Counters.total([slot.counters for slot in self._slots])

    def warm(self, batch: TokenBatch, timeout_s: float) -> float:
        """Run every request once and reset its count; the plugin records commands at the first run.

        Returns:
            Seconds of the slowest inference, with all requests in flight at once.
        """

        def run(slot: PinnedRequest) -> float:
            began = time.perf_counter()
            slot.run(batch, timeout_s)
            slot.counters.inferences = 0
            return time.perf_counter() - began

        with ThreadPoolExecutor(len(self._slots)) as callers:
            return max(callers.map(run, self._slots))

    @contextmanager
    def checkout(self) -> Iterator[PinnedRequest]:
        """Acquire a request, waiting for a free one, and release it at the end of the block.

        Raises:
            DeviceLost: the device is lost; callers that wait get this too.
            InferFailed: the engine is closed.
        """
        slot = self._acquire()
        try:
            yield slot
        except DeviceLost as error:
            # The request may still be running, so it is never released.
            with self._changed:
                self._fault = error
                self._changed.notify_all()
            raise
        except BaseException:
            self._release(slot)
            raise
        self._release(slot)

    def close(self) -> None:
        """Refuse further callers and drop the requests, unless one may still be running."""
        with self._changed:
            self._closed = True
            if not self._fault:
                self._slots = ()
                self._free.clear()
            self._changed.notify_all()

    def _acquire(self) -> PinnedRequest:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._fault or self._closed)
            if self._fault:
                raise DeviceLost(str(self._fault), self._fault.reason)
            if self._closed:
                raise InferFailed("The openvino engine is closed.")
            return self._free.pop()

    def _release(self, slot: PinnedRequest) -> None:
        with self._changed:
            if not self._closed:
                self._free.append(slot)
            self._changed.notify()


def request_count(optimal: str, wanted: int) -> int:
    """Decide the number of requests.

    Args:
        optimal: OPTIMAL_NUMBER_OF_INFER_REQUESTS of the compiled model as text, or empty.
        wanted: EMBEDQ_NPU_REQUESTS; 0 if it is not set.
    """
    if wanted:
        return wanted
    count = int(optimal) if optimal.isdigit() else FALLBACK_REQUESTS
    return min(max(count, 1), MAX_REQUESTS)
