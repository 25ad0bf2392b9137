"""One inference request of a device, and where its tensors lie.

Which memory a tensor lies in decides whether the NPU plugin may reuse its command list. Written in
place in the request's own tensors it changes nothing; a tensor of ours costs three updates of the
list, and page-aligned memory three imports in every inference. So the
tensors are pinned and every change of a pointer is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from embedq_worker.choices import Binding
from embedq_worker.engines.faults import infer_failed
from embedq_worker.errors import DeviceLost, Reason
from embedq_worker.packing import TokenBatch

Vectors = npt.NDArray[np.float32]

#: Inputs that change with every token batch; ``segments`` is the same for all of a shape.
CHANGING: Final = ("input_ids", "position_ids", "segment_ids")
INPUTS: Final = (*CHANGING, "segments")
OUTPUT: Final = "vectors"


class InferRequest(Protocol):
    """What we use of OpenVINO's request."""

    def get_tensor(self, name: str) -> Any: ...
    def set_tensor(self, name: str, tensor: Any) -> None: ...
    def start_async(self, inputs: Any = None, *, share_inputs: bool = False) -> None: ...
    def wait_for(self, timeout: int) -> bool: ...


@dataclass(slots=True)
class Counters:
    """What a device was asked, and how often its tensors lay elsewhere than before.

    Attributes:
        inferences: since the request was warmed.
        binds: tensors given to a request.
        pointer_changes, shape_changes, stride_changes: tensors found changed before a start.
    """

    inferences: int = 0
    binds: int = 0
    pointer_changes: int = 0
    shape_changes: int = 0
    stride_changes: int = 0

    @classmethod
    def total(cls, parts: Sequence[Counters]) -> Counters:
        """Add up."""
        return cls(*map(sum, zip(*map(astuple, parts), strict=True))) if parts else cls()


class Slot:
    """One request with its tensors; one caller at a time, which the pool sees to."""

    def __init__(
        self,
        request: InferRequest,
        binding: Binding,
        make_tensor: Callable[[npt.DTypeLike, tuple[int, ...]], Any],
        inputs: Collection[str] = INPUTS,
    ) -> None:
        """Take the request's tensors, or give it others.

        Args:
            request: of a compiled model with static shapes.
            binding: where its tensors lie.
            make_tensor: makes one in memory of the device, for ``host_tensor``.
            inputs: those that the model has; a foreign one may not look at positions.
        """
        self.counters = Counters()
        self._request = request
        self._binding = binding
        if binding is Binding.HOST_TENSOR:
            for name in inputs:
                own = request.get_tensor(name).data
                request.set_tensor(name, make_tensor(own.dtype, own.shape))
                self.counters.binds += 1
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
                f"An inference did not end within {deadline_s:.1f} s.", Reason.DEADLINE
            )
        self.counters.inferences += 1
        # Asked for anew: a plugin may put results elsewhere, and an old place holds old vectors.
        vectors: Vectors = np.array(self._request.get_tensor(OUTPUT).data, np.float32)
        return vectors

    def _start(self, batch: TokenBatch) -> None:
        fresh = {name: getattr(batch, name) for name in self._changing}
        if self._binding is Binding.SHARED:
            arrays = {**self._views, **fresh}
            del arrays[OUTPUT]
            self.counters.binds += len(arrays)
            self._request.start_async(arrays, share_inputs=True)
            return
        self._notice_changes()
        for name, array in fresh.items():
            np.copyto(self._views[name], array)
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
