"""Tests of embedding batches: order, outcomes, determinism, errors and the canary."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.stub_batches import stub_batch

from embedq.protocol.contract import Code, Device, OnLong, Outcome, Precision, Status
from embedq.testing import STUB_DIM, stub_vectors
from embedq_worker.engines.base import RaggedTokens, RowSpec, TokenBatch
from embedq_worker.engines.stub import StubEngine, StubTokenizer
from embedq_worker.errors import DeviceLost, EngineError, FailureReason, InferFailed
from embedq_worker.inference.embedder import CANARY_TEXT, Canary, Embedder
from embedq_worker.inference.planning import ChunkSchedule
from embedq_worker.inference.stats import EngineStats

OK = Outcome(device=Device.STUB, precision=Precision.F32)


class WideStub(StubEngine):
    """Stub for three concurrent callers that records the first tokens of each token batch."""

    concurrency = 3

    def __init__(self) -> None:
        super().__init__()
        self.token_batches: list[tuple[int, ...]] = []
        self._lock = threading.Lock()

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        with self._lock:
            self.token_batches.append(tuple(batch.input_ids[:, 0]))
        return super().infer(batch)


@pytest.fixture
def embedder() -> Iterator[Embedder]:
    """Open an embedder over the stub with chunks of 10 texts."""
    embedder = Embedder(
        StubTokenizer(), StubEngine(), token_budget=64, schedule=ChunkSchedule(10, 1, 10, 10)
    )
    yield embedder
    embedder.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=80), max_size=60))
def test_vectors_are_in_the_order_of_the_texts(texts: list[str]) -> None:
    embedder = Embedder(
        StubTokenizer(), WideStub(), token_budget=32, schedule=ChunkSchedule(7, 2, 20, 3)
    )

    vectors, outcomes = embedder.embed(stub_batch(texts))
    embedder.close()

    assert vectors.shape == (len(texts), STUB_DIM)
    assert vectors.tobytes() == stub_vectors(texts).tobytes()
    assert len(outcomes) == len(texts)


def test_token_batches_depend_on_the_batch_alone() -> None:
    texts = [f"text {i} " * (i % 17) for i in range(200)]
    token_batches = []

    for _ in range(2):
        engine = WideStub()
        embedder = Embedder(
            StubTokenizer(), engine, token_budget=64, schedule=ChunkSchedule(25, 2, 50, 10)
        )
        embedder.embed(stub_batch(texts))
        embedder.close()
        token_batches.append(sorted(engine.token_batches))

    assert token_batches[0] == token_batches[1]


def test_empty_batch_gives_no_vectors(embedder: Embedder) -> None:
    vectors, outcomes = embedder.embed(stub_batch([]))

    assert vectors.shape == (0, STUB_DIM)
    assert len(outcomes) == 0


def test_refused_text_gets_nan_and_its_code(embedder: Embedder) -> None:
    vectors, outcomes = embedder.embed(
        stub_batch(["one", "", "two"], refused={1: Code.NUL_CHARACTER})
    )

    assert np.isnan(vectors[1]).all()
    assert vectors[[0, 2]].tobytes() == stub_vectors(["one", "two"]).tobytes()
    assert outcomes[1] == Outcome(status=Status.FAILED, code=Code.NUL_CHARACTER)
    assert outcomes[2].status is Status.OK


def test_batch_of_refused_texts_gets_nan_and_codes(embedder: Embedder) -> None:
    vectors, outcomes = embedder.embed(
        stub_batch(["", ""], refused={0: Code.NOT_UNICODE, 1: Code.TEXT_TOO_LARGE})
    )

    assert np.isnan(vectors).all()
    assert [outcome.code for outcome in outcomes] == [Code.NOT_UNICODE, Code.TEXT_TOO_LARGE]


def test_truncated_text_has_flag_and_token_counts(embedder: Embedder) -> None:
    _, outcomes = embedder.embed(stub_batch(["short", "word " * 300]))

    assert outcomes[0].n_tokens == 3
    assert not outcomes[0].truncated
    assert outcomes[1].truncated
    assert (outcomes[1].n_tokens, outcomes[1].n_tokens_dropped) == (256, 300 - 254)


def test_too_long_text_fails_with_on_long_error(embedder: Embedder) -> None:
    vectors, outcomes = embedder.embed(stub_batch(["short", "word " * 300], on_long=OnLong.ERROR))

    assert np.isnan(vectors[1]).all()
    assert vectors[0].tobytes() == stub_vectors(["short"]).tobytes()
    assert outcomes[1] == Outcome(
        status=Status.FAILED, n_tokens_dropped=300 - 254, code=Code.TOO_MANY_TOKENS
    )


def test_text_without_tokens_fails() -> None:
    class NoSpecialTokens(StubTokenizer):
        def tokenize(self, texts: Sequence[str]) -> RaggedTokens:
            tokens = super().tokenize(texts)
            kept = np.array([bool(text) for text in texts])
            lengths = np.where(kept, tokens.lengths, 0)
            ids = tokens.ids[np.repeat(kept, tokens.lengths)]
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            return RaggedTokens(ids, offsets, tokens.n_dropped)

    embedder = Embedder(NoSpecialTokens(), StubEngine(), token_budget=64)
    vectors, outcomes = embedder.embed(stub_batch(["one", "", "two"]))
    embedder.close()

    assert np.isnan(vectors[1]).all()
    assert outcomes[1] == Outcome(status=Status.FAILED, code=Code.NO_TOKENS)
    assert vectors[[0, 2]].tobytes() == stub_vectors(["one", "two"]).tobytes()


def test_prompt_is_prepended_to_every_text(embedder: Embedder) -> None:
    vectors, _ = embedder.embed(stub_batch(["a", "b"], prompt="query: "))

    assert vectors.tobytes() == stub_vectors(["query: a", "query: b"]).tobytes()


def test_outcomes_of_a_rerouted_batch_have_the_flag(embedder: Embedder) -> None:
    _, outcomes = embedder.embed(stub_batch(["a", "b"], rerouted=True))

    assert [outcome.rerouted for outcome in outcomes] == [True, True]


def test_outcome_has_device_and_precision(embedder: Embedder) -> None:
    _, outcomes = embedder.embed(stub_batch(["one two"]))

    assert outcomes[0] == Outcome(n_tokens=4, device=Device.STUB, precision=Precision.F32)


def test_vector_that_is_not_finite_fails_the_batch(embedder: Embedder) -> None:
    with pytest.raises(InferFailed, match=r"1 of 3 vectors are not finite"):
        embedder.embed(stub_batch(["a", "embedq-fault:nan", "b"]))


def test_embedder_is_usable_after_a_failed_inference(embedder: Embedder) -> None:
    with pytest.raises(InferFailed):
        embedder.embed(stub_batch(["embedq-fault:raise", *map(str, range(50))]))

    vectors, _ = embedder.embed(stub_batch(["after"]))

    assert vectors.tobytes() == stub_vectors(["after"]).tobytes()


def test_device_lost_propagates() -> None:
    class Lost(StubEngine):
        def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
            raise DeviceLost("gone")

    embedder = Embedder(StubTokenizer(), Lost(), token_budget=64)

    with pytest.raises(DeviceLost, match="gone"):
        embedder.embed(stub_batch(["a"]))
    embedder.close()


def test_tokenizer_error_propagates() -> None:
    class Broken(StubTokenizer):
        def tokenize(self, texts: object) -> RaggedTokens:
            raise EngineError("no tokens")

    embedder = Embedder(Broken(), StubEngine(), token_budget=64)

    with pytest.raises(EngineError, match="no tokens"):
        embedder.embed(stub_batch(["a"]))
    embedder.close()


def test_concurrent_batches_do_not_mix(embedder: Embedder) -> None:
    found: dict[str, bytes] = {}

    def embed(name: str) -> None:
        texts = [f"{name} {i}" for i in range(100)]
        found[name] = embedder.embed(stub_batch(texts))[0].tobytes()

    callers = [threading.Thread(target=embed, args=(name,)) for name in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    for name in "ab":
        assert found[name] == stub_vectors([f"{name} {i}" for i in range(100)]).tobytes()


ROW_SPECS = (RowSpec.packed(256), RowSpec.packed(300), RowSpec.buckets(256))


def static_embedder(row_spec: RowSpec, engine: StubEngine | None = None) -> Embedder:
    """Return an embedder with static rows and a canary."""
    embedder = Embedder(StubTokenizer(), engine or WideStub(), token_budget=1, row_spec=row_spec)
    embedder.canary = Canary(
        StubTokenizer().tokenize([CANARY_TEXT]), stub_vectors([CANARY_TEXT])[0]
    )
    return embedder


@pytest.mark.parametrize("row_spec", ROW_SPECS)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=400), max_size=60))
def test_static_rows_and_canary_give_every_text_its_vector(
    row_spec: RowSpec, texts: list[str]
) -> None:
    embedder = static_embedder(row_spec)

    vectors, outcomes = embedder.embed(stub_batch(texts))
    embedder.close()

    assert vectors.tobytes() == stub_vectors(texts).tobytes()
    assert len(outcomes) == len(texts)


@pytest.mark.parametrize("row_spec", ROW_SPECS)
def test_static_rows_omit_failed_texts(row_spec: RowSpec) -> None:
    embedder = static_embedder(row_spec)
    texts = ["one", "", "word " * 300, "two"]

    vectors, outcomes = embedder.embed(
        stub_batch(texts, refused={1: Code.NUL_CHARACTER}, on_long=OnLong.ERROR)
    )
    embedder.close()

    assert [outcome.status for outcome in outcomes].count(Status.FAILED) == 2
    assert vectors[[0, 3]].tobytes() == stub_vectors(["one", "two"]).tobytes()
    assert np.isnan(vectors[[1, 2]]).all()


def test_batch_of_refused_texts_runs_no_inference() -> None:
    engine = WideStub()
    embedder = static_embedder(ROW_SPECS[0], engine)

    embedder.embed(stub_batch([""], refused={0: Code.NOT_UNICODE}))
    embedder.close()

    assert engine.token_batches == []


class WrongCanaryStub(StubEngine):
    """Stub that changes the canary's vector by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        vectors = super().infer(batch)
        last = int(batch.members.max())
        place = np.argwhere(batch.members == last)[0]
        if last == 3:  # three texts, then the canary
            vectors[tuple(place)] = np.roll(vectors[tuple(place)], 1) * self._factor
        return vectors


@pytest.mark.parametrize(
    ("factor", "reason"),
    [(1.0, FailureReason.WRONG_CANARY), (float("nan"), FailureReason.NOT_FINITE)],
)
def test_wrong_canary_fails_the_batch(factor: float, reason: FailureReason) -> None:
    embedder = static_embedder(ROW_SPECS[0], WrongCanaryStub(factor))

    with pytest.raises(InferFailed) as caught:
        embedder.embed(stub_batch(["a", "b", "c"]))
    embedder.close()

    assert caught.value.reason is reason


def test_stats_add_up_tokens_and_computed_tokens(embedder: Embedder) -> None:
    packed = static_embedder(RowSpec.packed(100))
    stats = EngineStats()

    packed.embed(stub_batch(["word " * 48] * 3), stats)
    packed.close()

    assert (stats.inferences, stats.tokens, stats.computed_tokens) == (2, 150, 200)
    assert stats.pack_fill_ratio == 0.75
    embedder.embed(stub_batch(["word " * 48] * 2), stats)
    assert (stats.tokens, stats.inferences) == (250, 4)


class PairedStub(StubEngine):
    """Stub whose inferences start in pairs; the one with the longer row ends last."""

    concurrency = 2

    def __init__(self) -> None:
        super().__init__()
        self._begun = threading.Barrier(2)
        self._short_ended = threading.Event()
        self.widths: list[int] = []

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        self._begun.wait(10)
        self.widths.append(batch.input_ids.shape[1])
        if batch.input_ids.shape[1] > 10:
            assert self._short_ended.wait(10)
        return super().infer(batch)

    def end_short(self) -> None:
        self._short_ended.set()


def test_stats_of_concurrent_callers_are_separate() -> None:
    engine = PairedStub()
    embedder = Embedder(
        StubTokenizer(), engine, token_budget=64, schedule=ChunkSchedule(10, 1, 10, 10)
    )
    short, long = EngineStats(), EngineStats()

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(embedder.embed, stub_batch(["word " * 20]), long)
        embedder.embed(stub_batch(["a"]), short)
        engine_s = embedder.meter.totals().busy_s
        engine.end_short()
        second.result()
    embedder.close()

    total = embedder.meter.totals()
    assert len(engine.widths) == 2
    assert (short.inferences, long.inferences) == (1, 1)
    assert 0 < short.infer_s <= engine_s < total.busy_s
    assert short.infer_s == short.busy_s
    assert long.infer_s == long.busy_s
    assert short.infer_s + long.infer_s <= total.infer_s + 1e-6


def test_fill_ratio_without_inferences_is_1() -> None:
    assert EngineStats().pack_fill_ratio == 1.0


def test_static_rows_depend_on_the_batch_alone() -> None:
    texts = [f"text {i} " * (i % 17) for i in range(200)]
    token_batches = []

    for _ in range(2):
        engine = WideStub()
        embedder = static_embedder(ROW_SPECS[0], engine)
        embedder.embed(stub_batch(texts))
        embedder.close()
        token_batches.append(sorted(engine.token_batches))

    assert token_batches[0] == token_batches[1]
