"""Pool of infer requests with pinned tensors.

One inference request of a device, and where its tensors lie.

Which memory a tensor lies in decides whether the NPU plugin may reuse its command list. Written in
place in the request's own tensors it changes nothing; a tensor of ours costs three updates of the
list, and page-aligned memory three imports in every inference. So the
tensors are pinned and every change of a pointer is counted.

Who may use which inference request.
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

from embedq_worker.engines.base import TokenBatch
from embedq_worker.engines.openvino_errors import infer_failed
from embedq_worker.errors import DeviceLost, FailureReason, InferFailed

Vectors = npt.NDArray[np.float32]


#: Inputs that change with every token batch; ``segments`` is the same for all of a shape.
CHANGING: Final = ("input_ids", "position_ids", "segment_ids")


INPUTS: Final = (*CHANGING, "segments")


OUTPUT: Final = "vectors"


class InferRequest(Protocol):
    """What we use of OpenVINO's request."""

    def get_tensor(self, name: str) -> Any: ...
    def start_async(self) -> None: ...
    def wait_for(self, timeout: int) -> bool: ...


@dataclass(slots=True)
class Counters:
    """What a device was asked, and how often its tensors lay elsewhere than before.

    Attributes:
        inferences: since the request was warmed.
        pointer_changes, shape_changes, stride_changes: tensors found changed before a start.
    """

    inferences: int = 0
    pointer_changes: int = 0
    shape_changes: int = 0
    stride_changes: int = 0

    @classmethod
    def total(cls, parts: Sequence[Counters]) -> Counters:
        """Add up."""
        return cls(*map(sum, zip(*map(astuple, parts), strict=True))) if parts else cls()


class PinnedRequest:
    """One request with its tensors; one caller at a time, which the pool sees to."""

    def __init__(self, request: InferRequest, inputs: Collection[str] = INPUTS) -> None:
        """Take the request's tensors.

        Args:
            request: of a compiled model with static shapes.
            inputs: those that the model has; a foreign one may not look at positions.
        """
        self.counters = Counters()
        self._request = request
        self._views: dict[str, npt.NDArray[Any]] = {
            name: request.get_tensor(name).data for name in (*inputs, OUTPUT)
        }
        self._changing = [name for name in CHANGING if name in inputs]
        if "segments" in inputs:
            self._views["segments"][:] = np.arange(1, self._views["segments"].size + 1)
        self._places = {name: _place(view) for name, view in self._views.items()}

    def run(self, batch: TokenBatch, deadline_s: float) -> Vectors:
        """Infer one token batch, float32 [1, S, D].

        Raises:
            DeviceLost: the deadline passed, or the device is gone; the request is not to be used.
            InferFailed: the inference failed.
        """
        if batch.input_ids.shape != self._views["input_ids"].shape:
            raise RuntimeError(f"A request was given {batch.input_ids.shape}. This is a bug.")
        try:
            self._start(batch)
            done = self._request.wait_for(max(1, int(1e3 * deadline_s)))
        except RuntimeError as error:
            raise infer_failed(error) from error
        if not done:
            raise DeviceLost(
                f"An inference did not end within {deadline_s:.1f} s.", FailureReason.DEADLINE
            )
        self.counters.inferences += 1
        # Asked for anew: a plugin may put results elsewhere, and an old place holds old vectors.
        vectors: Vectors = np.array(self._request.get_tensor(OUTPUT).data, np.float32)
        return vectors

    def _start(self, batch: TokenBatch) -> None:
        self._notice_changes()
        for name in self._changing:
            np.copyto(self._views[name], getattr(batch, name))
        self._request.start_async()

    def _notice_changes(self) -> None:
        for name, (pointer, shape, strides) in self._places.items():
            view = self._request.get_tensor(name).data
            found = _place(view)
            if found == (pointer, shape, strides):
                continue
            self.counters.pointer_changes += found[0] != pointer
            self.counters.shape_changes += found[1] != shape
            self.counters.stride_changes += found[2] != strides
            self._views[name], self._places[name] = view, found


def _place(view: npt.NDArray[Any]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    return view.ctypes.data, view.shape, view.strides


#: Requests where a plugin does not say how many it likes, and the most that it gets.
FALLBACK_REQUESTS: Final = 4


MOST_REQUESTS: Final = 8


class RequestPool:
    """The requests of one shape. A caller that finds none free waits; it never fails for that."""

    def __init__(self, slots: Sequence[PinnedRequest]) -> None:
        self._slots: Sequence[PinnedRequest] = tuple(slots)
        self._free = list(slots)
        self._changed = threading.Condition()
        self._fault: DeviceLost | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def lost(self) -> bool:
        """Say whether a request never came back, so that only a new process helps."""
        return self._fault is not None

    def counters(self) -> Counters:
        """Return what all requests together were asked."""
        return Counters.total([slot.counters for slot in self._slots])

    def warm(self, batch: TokenBatch, deadline_s: float) -> float:
        """Run every request once, for the plugin records its commands at the first; then recount.

        Returns:
            Seconds of the slowest, with all of them in flight as in service.
        """

        def run(slot: PinnedRequest) -> float:
            began = time.perf_counter()
            slot.run(batch, deadline_s)
            slot.counters.inferences = 0
            return time.perf_counter() - began

        with ThreadPoolExecutor(len(self._slots)) as callers:
            return max(callers.map(run, self._slots))

    @contextmanager
    def checkout(self) -> Iterator[PinnedRequest]:
        """Lend a request, waiting for one; after a lost device nobody gets or waits for one.

        Raises:
            DeviceLost: the device is lost.
            InferFailed: the engine is closed.
        """
        slot = self._take()
        try:
            yield slot
        except DeviceLost as error:
            # It may still be running: it is never lent again.
            with self._changed:
                self._fault = error
                self._changed.notify_all()
            raise
        except BaseException:
            self._give_back(slot)
            raise
        self._give_back(slot)

    def close(self) -> None:
        """Lend no more, and let go of the requests, unless one of them still runs."""
        with self._changed:
            self._closed = True
            if not self._fault:
                self._slots = ()
                self._free.clear()
            self._changed.notify_all()

    def _take(self) -> PinnedRequest:
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._fault or self._closed)
            if self._fault:
                raise DeviceLost(str(self._fault), self._fault.reason)
            if self._closed:
                raise InferFailed("The openvino engine is closed.")
            return self._free.pop()

    def _give_back(self, slot: PinnedRequest) -> None:
        with self._changed:
            if not self._closed:
                self._free.append(slot)
            self._changed.notify()


def request_count(optimal: str, wanted: int) -> int:
    """Decide how many requests to have.

    Args:
        optimal: what the compiled model says, in text; may be nothing.
        wanted: what the settings say, 0 for nothing.
    """
    if wanted:
        return wanted
    count = int(optimal) if optimal.isdigit() else FALLBACK_REQUESTS
    return min(max(count, 1), MOST_REQUESTS)
