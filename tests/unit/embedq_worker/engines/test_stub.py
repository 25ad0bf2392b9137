"""Tests of the stub engine: vectors, tokens, faults and speed."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.stub_batches import stub_batch

from embedq.errors import SettingsError
from embedq.protocol.contract import Device, Outcome, Precision
from embedq.testing import stub_hashes, stub_vectors, vectors_of_hashes
from embedq_worker.engines.base import RaggedTokens, TokenBatch
from embedq_worker.engines.factory import open_engine
from embedq_worker.engines.stub import EXIT_STATUS, StubEngine, StubTokenizer, stub_model_info
from embedq_worker.errors import InferFailed
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.packing import build_padded


def infer(texts: list[str], engine: StubEngine | None = None) -> np.ndarray:
    """Infer texts as one padded token batch, float32 [n, D]."""
    tokens = StubTokenizer().tokenize(texts)
    batch = build_padded(tokens, range(len(texts)), 0)
    return (engine or StubEngine()).infer(batch)[:, 0]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=20))
def test_engine_returns_the_vectors_of_stub_vectors(texts: list[str]) -> None:
    assert infer(texts).tobytes() == stub_vectors(texts).tobytes()


@pytest.mark.parametrize("dim", [1, 7, 384, 1024])
def test_vectors_have_unit_length(dim: int) -> None:
    vectors = stub_vectors(map(str, range(500)), dim)

    assert vectors.shape == (500, dim)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6


def test_vector_is_independent_of_the_other_texts() -> None:
    texts = [f"text {i}" for i in range(1000)]

    together = stub_vectors(texts)

    for row in (0, 1, 499, 999):
        assert stub_vectors([texts[row]]).tobytes() == together[row].tobytes()


def test_hash_and_signs_of_a_text_never_change() -> None:
    # Recorded values: a worker and a producer of different versions must agree.
    assert int(stub_hashes(["embedq"])[0]) == 0x1F1855C57EC58653
    assert np.sign(stub_vectors(["embedq"])[0, :16]).astype(int).tolist() == [
        -1,
        1,
        -1,
        -1,
        1,
        -1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        -1,
        1,
    ]


def test_different_texts_have_cosines_below_0_8() -> None:
    vectors = stub_vectors(map(str, range(500)))

    cosines = vectors @ vectors.T - np.eye(500)

    assert cosines.max() < 0.8


def test_packed_row_returns_a_vector_per_segment() -> None:
    tokens = StubTokenizer().tokenize(["one two", "", "three"])
    lengths = tokens.lengths
    batch = TokenBatch(
        input_ids=tokens.ids.astype(np.int64)[None],
        position_ids=np.concatenate([np.arange(n) for n in lengths])[None],
        segment_ids=np.repeat([1, 2, 3], lengths)[None],
        segments=np.arange(1, 5),
        members=np.array([[0, 1, 2, -1]]),
    )

    vectors = StubEngine().infer(batch)

    assert vectors[0, :3].tobytes() == stub_vectors(["one two", "", "three"]).tobytes()
    assert not vectors[0, 3].any()


def test_tokens_are_two_plus_words_up_to_the_limit() -> None:
    tokens: RaggedTokens = StubTokenizer(max_length=5).tokenize(["", "one", "a b c d e"])

    assert list(tokens.lengths) == [2, 3, 5]
    assert list(tokens.n_dropped) == [0, 0, 2]


def test_embedded_batch_is_bit_identical_to_stub_vectors() -> None:
    texts = [f"text {i} " * (i % 50) for i in range(700)]
    embedder = Embedder(StubTokenizer(), StubEngine(), token_budget=512)

    vectors, outcomes = embedder.embed(stub_batch(texts))
    embedder.close()

    assert vectors.tobytes() == stub_vectors(texts).tobytes()
    assert outcomes[1] == Outcome(n_tokens=4, device=Device.STUB, precision=Precision.F32)


def test_fault_raise_raises_infer_failed() -> None:
    with pytest.raises(InferFailed):
        infer(["fine", "embedq-fault:raise and more"])


def test_fault_nan_changes_one_vector_to_nan() -> None:
    vectors = infer(["fine", "embedq-fault:nan"])

    assert vectors[0].tobytes() == stub_vectors(["fine"]).tobytes()
    assert np.isnan(vectors[1]).all()


@pytest.mark.parametrize(("fault", "status"), [("exit", EXIT_STATUS), ("segfault", -11)])
def test_fault_exit_or_segfault_ends_the_process(fault: str, status: int) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "from embedq_worker.engines.stub import StubEngine, StubTokenizer\n"
        "from embedq_worker.inference.packing import build_padded\n"
        f"tokens = StubTokenizer().tokenize(['embedq-fault:{fault}'])\n"
        "StubEngine().infer(build_padded(tokens, [0], 0))\n"
    )

    ended = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)

    assert ended.returncode == status


def test_fault_hang_never_returns() -> None:
    caller = threading.Thread(target=infer, args=(["embedq-fault:hang"],), daemon=True)
    caller.start()

    caller.join(timeout=0.2)

    assert caller.is_alive()


def test_unknown_fault_is_embedded_as_text() -> None:
    texts = ["embedq-fault:", "embedq-fault:unknown", "about embedq-fault:raise"]

    assert infer(texts).tobytes() == stub_vectors(texts).tobytes()


def test_inference_takes_the_scripted_time() -> None:
    engine = StubEngine(delay_s=0.01, texts_per_s=200)
    began = time.monotonic()

    for _ in range(2):
        infer(["text"] * 10, engine)

    assert time.monotonic() - began >= 0.12


def test_open_engine_opens_the_stub_without_a_model() -> None:
    engine = open_engine("stub", None)

    assert (engine.name, engine.dim) == ("stub", stub_model_info().dim)


def test_open_engine_refuses_an_unknown_name_with_a_hint() -> None:
    with pytest.raises(SettingsError, match="Did you mean onnxruntime"):
        open_engine("onnxruntme", None)


def test_open_engine_requires_a_model() -> None:
    with pytest.raises(SettingsError, match="needs a model"):
        open_engine("onnxruntime", None)


def test_each_bit_of_a_hash_changes_the_vector() -> None:
    hashes = np.array([0, *(1 << bit for bit in range(64))], np.uint64)

    vectors = vectors_of_hashes(hashes)

    assert len({row.tobytes() for row in vectors}) == 65
