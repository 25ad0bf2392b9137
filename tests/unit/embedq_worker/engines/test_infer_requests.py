"""Tests of pinned infer requests and the pool that shares them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedq_worker.engines.base import INPUTS, RaggedTokens, RowSpec, TokenBatch
from embedq_worker.engines.infer_requests import (
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
    """Tensor like OpenVINO's, whose data is a view."""

    def __init__(self, data: npt.NDArray[Any]) -> None:
        self.data = data


class FakeRequest:
    """Infer request that answers its input ids and counts its starts."""

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


def row_from(first: int) -> TokenBatch:
    """Return a row whose eight tokens count up from `first`."""
    ids = np.arange(first, first + 8, dtype=np.int32)
    tokens = RaggedTokens(ids, np.array([0, 8], np.int64), np.zeros(1, np.uint32))
    return build_rows(tokens, [[0]], 0, FORM)[0]


def test_input_tensors_are_filled_in_place() -> None:
    request = FakeRequest()
    before = {name: request.tensors[name].data.ctypes.data for name in INPUTS}
    slot = PinnedRequest(request)

    answers = [slot.run(row_from(first), 1.0)[0, 0, 0] for first in (1, 20, 300)]

    assert answers == [1, 20, 300]
    assert request.starts == 3
    assert {name: request.tensors[name].data.ctypes.data for name in INPUTS} == before
    assert list(request.tensors["segments"].data) == [1, 2, 3, 4]
    assert slot.counters == Counters(inferences=3)


def test_vectors_do_not_change_with_the_next_inference() -> None:
    slot = PinnedRequest(FakeRequest())
    first = slot.run(row_from(1), 1.0)

    slot.run(row_from(50), 1.0)

    assert first[0, 0, 0] == 1


def test_moved_tensor_is_counted_once_and_filled() -> None:
    request = FakeRequest()
    slot = PinnedRequest(request)
    slot.run(row_from(1), 1.0)
    request.tensors["input_ids"] = Tensor(np.zeros((1, 8), np.int64))

    assert slot.run(row_from(7), 1.0)[0, 0, 0] == 7
    assert slot.counters == Counters(inferences=2, pointer_changes=1)

    slot.run(row_from(8), 1.0)
    assert slot.counters.pointer_changes == 1


def test_changed_strides_and_shapes_are_counted_separately() -> None:
    request = FakeRequest()
    slot = PinnedRequest(request)
    request.tensors["input_ids"] = Tensor(np.zeros((1, 16), np.int64)[:, ::2])
    request.tensors["vectors"] = Tensor(np.zeros((1, 5, DIM), np.float32)[:, :4])
    slot.run(row_from(1), 1.0)

    assert slot.counters.stride_changes == 2
    assert slot.counters.shape_changes == 0
    request.tensors["vectors"] = Tensor(np.zeros((1, 4, DIM + 1), np.float32))
    slot.run(row_from(1), 1.0)
    assert slot.counters.shape_changes == 1


def test_row_of_another_shape_raises_runtime_error() -> None:
    tokens = RaggedTokens(np.ones(9, np.int32), np.array([0, 9]), np.zeros(1, np.uint32))

    with pytest.raises(RuntimeError, match="This is a bug"):
        PinnedRequest(FakeRequest()).run(build_rows(tokens, [[0]], 0, RowSpec.packed(16))[0], 1.0)


def test_inference_past_its_deadline_is_a_lost_device() -> None:
    request = FakeRequest()
    request.answers = False

    with pytest.raises(DeviceLost, match=r"within 0\.5 s") as caught:
        PinnedRequest(request).run(row_from(1), 0.5)

    assert caught.value.reason is FailureReason.DEADLINE


def test_callers_share_requests_one_at_a_time() -> None:
    pool = RequestPool([PinnedRequest(FakeRequest()) for _ in range(2)])

    def infer_first(first: int) -> float:
        with pool.checkout() as slot:
            return float(slot.run(row_from(first), 1.0)[0, 0, 0])

    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(infer_first, range(200)))

    assert answers == list(range(200))
    assert pool.counters().inferences == 200


def test_request_is_reused_after_a_failed_inference() -> None:
    request = FakeRequest()
    pool = RequestPool([PinnedRequest(request)])
    request.error = "odd"
    with pytest.raises(InferFailed), pool.checkout() as slot:
        slot.run(row_from(1), 1.0)

    request.error = ""
    with pool.checkout() as slot:
        assert slot.run(row_from(1), 1.0)[0, 0, 0] == 1
    assert not pool.lost


def test_lost_device_fails_waiting_and_later_callers() -> None:
    pool = RequestPool([PinnedRequest(FakeRequest())])
    waiting = threading.Event()
    reasons: list[FailureReason] = []

    def check_out() -> None:
        waiting.set()
        try:
            with pool.checkout():
                pass
        except DeviceLost as error:
            reasons.append(error.reason)

    caller = threading.Thread(target=check_out)
    with pytest.raises(DeviceLost), pool.checkout():
        caller.start()
        waiting.wait(5)
        raise DeviceLost("gone", FailureReason.DEADLINE)
    caller.join(5)

    assert reasons == [FailureReason.DEADLINE]
    assert pool.lost
    with pytest.raises(DeviceLost, match="gone"), pool.checkout():
        pass


def test_closed_pool_raises_infer_failed() -> None:
    pool = RequestPool([PinnedRequest(FakeRequest())])
    pool.close()

    with pytest.raises(InferFailed, match="closed"), pool.checkout():
        pass


def test_warm_up_runs_every_request_without_counting() -> None:
    requests = [FakeRequest() for _ in range(3)]
    pool = RequestPool([PinnedRequest(request) for request in requests])

    seconds = pool.warm(row_from(1), 1.0)

    assert seconds > 0
    assert [request.starts for request in requests] == [1, 1, 1]
    assert pool.counters() == Counters()


@pytest.mark.parametrize(
    ("optimal", "wanted", "count"),
    [("4", 0, 4), ("8", 0, 8), ("1", 0, 1), ("64", 0, 8), ("0", 0, 1), ("", 0, 4), ("4", 2, 2)],
)
def test_request_count_follows_the_device_unless_set(optimal: str, wanted: int, count: int) -> None:
    assert request_count(optimal, wanted) == count
