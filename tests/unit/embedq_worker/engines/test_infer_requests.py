"""Tensors stay where they are, every move is counted, and callers wait for a free request."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedq_worker.engines.base import RaggedTokens, RowSpec, TokenBatch
from embedq_worker.engines.infer_requests import (
    INPUTS,
    Counters,
    PinnedRequest,
    RequestPool,
    request_count,
)
from embedq_worker.errors import DeviceLost, FailureReason, InferFailed
from embedq_worker.inference.packing import build_rows

FORM = RowSpec.packed(8)
DIM = 4


class Tensor:
    """A tensor as OpenVINO's: its data is a view."""

    def __init__(self, data: npt.NDArray[Any]) -> None:
        self.data = data


class FakeRequest:
    """A request that answers its input ids, and remembers how it was used."""

    def __init__(self) -> None:
        self.tensors = {name: Tensor(np.zeros((1, 8), np.int64)) for name in INPUTS}
        self.tensors["segments"] = Tensor(np.zeros(4, np.int64))
        self.tensors["vectors"] = Tensor(np.zeros((1, 4, DIM), np.float32))
        self.starts = 0
        self.answers = True
        self.error = ""
        self.users = 0

    def get_tensor(self, name: str) -> Tensor:
        return self.tensors[name]

    def start_async(self) -> None:
        self.users += 1
        assert self.users == 1, "used by two at once"
        self.starts += 1

    def wait_for(self, timeout: int) -> bool:
        time.sleep(0.001)
        self.users -= 1
        if self.error:
            raise RuntimeError(self.error)
        ids = self.tensors["input_ids"].data[0, :4].astype(np.float32)
        self.tensors["vectors"].data[0] = ids[:, None]
        return self.answers


def row(first: int) -> TokenBatch:
    """Build a row whose tokens count up from here."""
    ids = np.arange(first, first + 8, dtype=np.int32)
    tokens = RaggedTokens(ids, np.array([0, 8], np.int64), np.zeros(1, np.uint32))
    return build_rows(tokens, [[0]], 0, FORM)[0]


def test_pinned_tensors_are_filled_in_place() -> None:
    """The request's own memory holds the row."""
    request = FakeRequest()
    before = {name: request.tensors[name].data.ctypes.data for name in INPUTS}
    slot = PinnedRequest(request)

    answers = [slot.run(row(first), 1.0)[0, 0, 0] for first in (1, 20, 300)]

    assert answers == [1, 20, 300]
    assert request.starts == 3
    assert {name: request.tensors[name].data.ctypes.data for name in INPUTS} == before
    assert list(request.tensors["segments"].data) == [1, 2, 3, 4]
    assert slot.counters == Counters(inferences=3)


def test_vectors_are_a_copy() -> None:
    """The next inference of a request does not change what the last one gave."""
    slot = PinnedRequest(FakeRequest())
    first = slot.run(row(1), 1.0)

    slot.run(row(50), 1.0)

    assert first[0, 0, 0] == 1


def test_moved_tensor_is_counted_and_used() -> None:
    """A pointer that changed is one change, and the row goes where the tensor is now."""
    request = FakeRequest()
    slot = PinnedRequest(request)
    slot.run(row(1), 1.0)
    request.tensors["input_ids"] = Tensor(np.zeros((1, 8), np.int64))

    assert slot.run(row(7), 1.0)[0, 0, 0] == 7
    assert slot.counters == Counters(inferences=2, pointer_changes=1)

    slot.run(row(8), 1.0)
    assert slot.counters.pointer_changes == 1


def test_changed_strides_and_shape_are_counted() -> None:
    """A tensor that is laid out in another way is told from one that has only moved."""
    request = FakeRequest()
    slot = PinnedRequest(request)
    request.tensors["input_ids"] = Tensor(np.zeros((1, 16), np.int64)[:, ::2])
    request.tensors["vectors"] = Tensor(np.zeros((1, 5, DIM), np.float32)[:, :4])
    slot.run(row(1), 1.0)

    assert slot.counters.stride_changes == 2
    assert slot.counters.shape_changes == 0
    request.tensors["vectors"] = Tensor(np.zeros((1, 4, DIM + 1), np.float32))
    slot.run(row(1), 1.0)
    assert slot.counters.shape_changes == 1


def test_row_of_another_shape_is_a_bug() -> None:
    """A static request never sees another width."""
    tokens = RaggedTokens(np.ones(9, np.int32), np.array([0, 9]), np.zeros(1, np.uint32))

    with pytest.raises(RuntimeError, match="This is a bug"):
        PinnedRequest(FakeRequest()).run(build_rows(tokens, [[0]], 0, RowSpec.packed(16))[0], 1.0)


def test_missed_deadline_is_a_lost_device() -> None:
    """There is no way to end an inference, so a hung one means a new process."""
    request = FakeRequest()
    request.answers = False

    with pytest.raises(DeviceLost, match=r"within 0\.5 s") as caught:
        PinnedRequest(request).run(row(1), 0.5)

    assert caught.value.reason is FailureReason.DEADLINE


def test_more_callers_than_requests_wait() -> None:
    """Sixteen callers share two requests; none fails and none shares one."""
    pool = RequestPool([PinnedRequest(FakeRequest()) for _ in range(2)])

    def ask(first: int) -> float:
        with pool.checkout() as slot:
            return float(slot.run(row(first), 1.0)[0, 0, 0])

    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(ask, range(200)))

    assert answers == list(range(200))
    assert pool.counters().inferences == 200


def test_failed_inference_gives_the_request_back() -> None:
    """After an error that is not a lost device, the same request serves again."""
    request = FakeRequest()
    pool = RequestPool([PinnedRequest(request)])
    request.error = "odd"
    with pytest.raises(InferFailed), pool.checkout() as slot:
        slot.run(row(1), 1.0)

    request.error = ""
    with pool.checkout() as slot:
        assert slot.run(row(1), 1.0)[0, 0, 0] == 1
    assert not pool.lost


def test_lost_device_ends_the_wait_of_all() -> None:
    """Callers that wait for a request of a lost device hear of it, and so do later ones."""
    pool = RequestPool([PinnedRequest(FakeRequest())])
    waiting = threading.Event()
    heard: list[FailureReason] = []

    def ask() -> None:
        waiting.set()
        try:
            with pool.checkout():
                pass
        except DeviceLost as error:
            heard.append(error.reason)

    caller = threading.Thread(target=ask)
    with pytest.raises(DeviceLost), pool.checkout():
        caller.start()
        waiting.wait(5)
        raise DeviceLost("gone", FailureReason.DEADLINE)
    caller.join(5)

    assert heard == [FailureReason.DEADLINE]
    assert pool.lost
    with pytest.raises(DeviceLost, match="gone"), pool.checkout():
        pass


def test_closed_pool_says_so() -> None:
    """After close nobody gets a request."""
    pool = RequestPool([PinnedRequest(FakeRequest())])
    pool.close()

    with pytest.raises(InferFailed, match="closed"), pool.checkout():
        pass


def test_every_request_is_warmed_and_none_of_it_counted() -> None:
    """The first inference of each request records its commands; counting starts after it."""
    requests = [FakeRequest() for _ in range(3)]
    pool = RequestPool([PinnedRequest(request) for request in requests])

    seconds = pool.warm(row(1), 1.0)

    assert seconds > 0
    assert [request.starts for request in requests] == [1, 1, 1]
    assert pool.counters() == Counters()


@pytest.mark.parametrize(
    ("optimal", "wanted", "count"),
    [("4", 0, 4), ("8", 0, 8), ("1", 0, 1), ("64", 0, 8), ("0", 0, 1), ("", 0, 4), ("4", 2, 2)],
)
def test_requests_are_as_many_as_the_device_likes(optimal: str, wanted: int, count: int) -> None:
    """The device says, 1 to 8; 4 where it says nothing; a setting wins."""
    assert request_count(optimal, wanted) == count
