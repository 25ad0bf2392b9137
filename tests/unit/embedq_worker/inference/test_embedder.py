"""Batches become vectors in order, with one outcome per text and the same bytes each time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedq.protocol.contract import Code, Device, OnLong, Outcome, Precision, Status, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.testing import stub_vectors
from embedq_worker.engines.base import RaggedTokens, RowSpec, TokenBatch
from embedq_worker.engines.stub import StubEngine, StubTokenizer, stub_model_info
from embedq_worker.errors import DeviceLost, EngineError, FailureReason, InferFailed
from embedq_worker.inference.embedder import CANARY_TEXT, Canary, Embedder
from embedq_worker.inference.planning import ChunkSchedule
from embedq_worker.inference.stats import EngineStats

SPEC = VectorSpec(stub_model_info().identity, stub_model_info().dim, stub_model_info().max_length)
OK = Outcome(device=Device.STUB, precision=Precision.F32)


class WideStub(StubEngine):
    """A stub that likes several callers and remembers what it was asked."""

    concurrency = 3

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, ...]] = []
        self._lock = threading.Lock()

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        with self._lock:
            self.asked.append(tuple(batch.input_ids[:, 0]))
        return super().infer(batch)


@pytest.fixture
def embedder() -> Iterator[Embedder]:
    """An embedder over the stub, with chunks of 10 texts."""
    embedder = Embedder(
        StubTokenizer(), StubEngine(), token_budget=64, pace=ChunkSchedule(10, 1, 10, 10)
    )
    yield embedder
    embedder.close()


def batch_of(texts: list[str], **options: object) -> EmbedBatch:
    """Make a batch for the stub."""
    refused = options.pop("refused", {})
    rerouted = bool(options.pop("rerouted", False))
    return EmbedBatch("job", 0, texts, SPEC._replace(**options), refused, rerouted)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=80), max_size=60))
def test_vectors_come_back_in_order(texts: list[str]) -> None:
    """Row i is the vector of text i, however texts are sorted and grouped."""
    embedder = Embedder(
        StubTokenizer(), WideStub(), token_budget=32, pace=ChunkSchedule(7, 2, 20, 3)
    )

    vectors, outcomes = embedder.embed(batch_of(texts))
    embedder.close()

    assert vectors.shape == (len(texts), SPEC.dim)
    assert vectors.tobytes() == stub_vectors(texts).tobytes()
    assert len(outcomes) == len(texts)


def test_grouping_depends_on_the_batch_alone() -> None:
    """Two runs ask the engine for the same token batches, in whatever order threads take them."""
    texts = [f"text {i} " * (i % 17) for i in range(200)]
    asked = []

    for _ in range(2):
        engine = WideStub()
        embedder = Embedder(
            StubTokenizer(), engine, token_budget=64, pace=ChunkSchedule(25, 2, 50, 10)
        )
        embedder.embed(batch_of(texts))
        embedder.close()
        asked.append(sorted(engine.asked))

    assert asked[0] == asked[1]


def test_empty_batch_is_embedded(embedder: Embedder) -> None:
    """No texts give no vectors and no error."""
    vectors, outcomes = embedder.embed(batch_of([]))

    assert vectors.shape == (0, SPEC.dim)
    assert len(outcomes) == 0


def test_refused_text_has_no_vector(embedder: Embedder) -> None:
    """A text refused on the way has a row of NaN and its code; its neighbors are served."""
    vectors, outcomes = embedder.embed(
        batch_of(["one", "", "two"], refused={1: Code.NUL_CHARACTER})
    )

    assert np.isnan(vectors[1]).all()
    assert vectors[[0, 2]].tobytes() == stub_vectors(["one", "two"]).tobytes()
    assert outcomes[1] == Outcome(status=Status.FAILED, code=Code.NUL_CHARACTER)
    assert outcomes[2].status is Status.OK


def test_batch_of_refused_texts_never_meets_the_engine(embedder: Embedder) -> None:
    """Where every text is refused, the engine is not asked and nothing raises."""
    vectors, outcomes = embedder.embed(
        batch_of(["", ""], refused={0: Code.NOT_UNICODE, 1: Code.TEXT_TOO_LARGE})
    )

    assert np.isnan(vectors).all()
    assert [outcome.code for outcome in outcomes] == [Code.NOT_UNICODE, Code.TEXT_TOO_LARGE]


def test_truncated_text_is_flagged_and_counted(embedder: Embedder) -> None:
    """A text beyond the limit is embedded in part, and its outcome says how much was dropped."""
    _, outcomes = embedder.embed(batch_of(["short", "word " * 300]))

    assert outcomes[0].n_tokens == 3
    assert not outcomes[0].truncated
    assert outcomes[1].truncated
    assert (outcomes[1].n_tokens, outcomes[1].n_tokens_dropped) == (256, 300 - 254)


def test_too_long_text_fails_if_the_job_says_so(embedder: Embedder) -> None:
    """With `on_long=error` a text that would be cut has no vector; the rest does."""
    vectors, outcomes = embedder.embed(batch_of(["short", "word " * 300], on_long=OnLong.ERROR))

    assert np.isnan(vectors[1]).all()
    assert vectors[0].tobytes() == stub_vectors(["short"]).tobytes()
    assert outcomes[1] == Outcome(
        status=Status.FAILED, n_tokens_dropped=300 - 254, code=Code.TOO_MANY_TOKENS
    )


def test_prompt_goes_before_every_text(embedder: Embedder) -> None:
    """The prompt of the job is part of what is embedded."""
    vectors, _ = embedder.embed(batch_of(["a", "b"], prompt="query: "))

    assert vectors.tobytes() == stub_vectors(["query: a", "query: b"]).tobytes()


def test_rerouted_batch_says_so(embedder: Embedder) -> None:
    """Each outcome of a batch that was handed over carries the flag."""
    _, outcomes = embedder.embed(batch_of(["a", "b"], rerouted=True))

    assert [outcome.rerouted for outcome in outcomes] == [True, True]


def test_outcome_names_device_and_precision(embedder: Embedder) -> None:
    """An outcome says what computed the vector."""
    _, outcomes = embedder.embed(batch_of(["one two"]))

    assert outcomes[0] == Outcome(n_tokens=4, device=Device.STUB, precision=Precision.F32)


def test_vector_that_is_not_finite_is_a_fault_of_the_engine(embedder: Embedder) -> None:
    """One NaN refuses the whole batch: a wrong vector is worse than none."""
    with pytest.raises(InferFailed, match=r"1 of 3 vectors that are not finite"):
        embedder.embed(batch_of(["a", "embedq-fault:nan", "b"]))


def test_failed_inference_leaves_the_embedder_usable(embedder: Embedder) -> None:
    """After an error of the engine the next batch is served."""
    with pytest.raises(InferFailed):
        embedder.embed(batch_of(["embedq-fault:raise", *map(str, range(50))]))

    vectors, _ = embedder.embed(batch_of(["after"]))

    assert vectors.tobytes() == stub_vectors(["after"]).tobytes()


def test_lost_device_is_passed_on() -> None:
    """What the engine raises reaches the caller as it is."""

    class Lost(StubEngine):
        def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
            raise DeviceLost("gone")

    embedder = Embedder(StubTokenizer(), Lost(), token_budget=64)

    with pytest.raises(DeviceLost, match="gone"):
        embedder.embed(batch_of(["a"]))
    embedder.close()


def test_failed_tokenizer_is_passed_on() -> None:
    """An error while tokenizing ahead reaches the caller."""

    class Broken(StubTokenizer):
        def tokenize(self, texts: object) -> RaggedTokens:
            raise EngineError("no tokens")

    embedder = Embedder(Broken(), StubEngine(), token_budget=64)

    with pytest.raises(EngineError, match="no tokens"):
        embedder.embed(batch_of(["a"]))
    embedder.close()


def test_two_threads_may_embed_at_once(embedder: Embedder) -> None:
    """Batches of two callers do not mix."""
    found: dict[str, bytes] = {}

    def embed(name: str) -> None:
        texts = [f"{name} {i}" for i in range(100)]
        found[name] = embedder.embed(batch_of(texts))[0].tobytes()

    callers = [threading.Thread(target=embed, args=(name,)) for name in "ab"]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()

    for name in "ab":
        assert found[name] == stub_vectors([f"{name} {i}" for i in range(100)]).tobytes()


FORMS = (RowSpec.packed(256), RowSpec.packed(300), RowSpec.buckets(256))


def static_embedder(form: RowSpec, engine: StubEngine | None = None) -> Embedder:
    """Make an embedder that gives its engine static rows, with a canary in each batch."""
    embedder = Embedder(StubTokenizer(), engine or WideStub(), token_budget=1, form=form)
    embedder.canary = Canary(
        StubTokenizer().tokenize([CANARY_TEXT]), stub_vectors([CANARY_TEXT])[0]
    )
    return embedder


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii"), max_size=400), max_size=60))
def test_static_rows_give_every_text_its_vector(form: RowSpec, texts: list[str]) -> None:
    """Packed or in buckets, row i is the vector of text i, and the canary takes nobody's place."""
    embedder = static_embedder(form)

    vectors, outcomes = embedder.embed(batch_of(texts))
    embedder.close()

    assert vectors.tobytes() == stub_vectors(texts).tobytes()
    assert len(outcomes) == len(texts)


@pytest.mark.parametrize("form", FORMS)
def test_static_rows_leave_out_what_failed(form: RowSpec) -> None:
    """Refused and too long texts take no room in a row; their neighbors are served."""
    embedder = static_embedder(form)
    texts = ["one", "", "word " * 300, "two"]

    vectors, outcomes = embedder.embed(
        batch_of(texts, refused={1: Code.NUL_CHARACTER}, on_long=OnLong.ERROR)
    )
    embedder.close()

    assert [outcome.status for outcome in outcomes].count(Status.FAILED) == 2
    assert vectors[[0, 3]].tobytes() == stub_vectors(["one", "two"]).tobytes()
    assert np.isnan(vectors[[1, 2]]).all()


def test_batch_without_a_text_needs_no_canary() -> None:
    """Where nothing is embedded, the device is not asked at all."""
    engine = WideStub()
    embedder = static_embedder(FORMS[0], engine)

    embedder.embed(batch_of([""], refused={0: Code.NOT_UNICODE}))
    embedder.close()

    assert engine.asked == []


class WrongFrom(StubEngine):
    """A stub that spoils the canary's vector: with another vector, or with none."""

    def __init__(self, spoilt: float) -> None:
        super().__init__()
        self._spoilt = spoilt

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        vectors = super().infer(batch)
        last = int(batch.members.max())
        seat = np.argwhere(batch.members == last)[0]
        if last == 3:  # three texts, then the canary
            vectors[tuple(seat)] = np.roll(vectors[tuple(seat)], 1) * self._spoilt
        return vectors


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [(1.0, FailureReason.WRONG_CANARY), (float("nan"), FailureReason.NOT_FINITE)],
)
def test_wrong_canary_refuses_the_batch(spoilt: float, reason: FailureReason) -> None:
    """No vector of a batch is handed out whose canary came out wrong."""
    embedder = static_embedder(FORMS[0], WrongFrom(spoilt))

    with pytest.raises(InferFailed) as caught:
        embedder.embed(batch_of(["a", "b", "c"]))
    embedder.close()

    assert caught.value.reason is reason


def test_stats_say_how_full_the_rows_were(embedder: Embedder) -> None:
    """Tokens of the texts against all that was computed; several calls add up."""
    packed = static_embedder(RowSpec.packed(100))
    stats = EngineStats()

    packed.embed(batch_of(["word " * 48] * 3), stats)
    packed.close()

    assert (stats.inferences, stats.tokens, stats.computed_tokens) == (2, 150, 200)
    assert stats.pack_fill_ratio == 0.75
    embedder.embed(batch_of(["word " * 48] * 2), stats)
    assert (stats.tokens, stats.inferences) == (250, 4)


class PairedStub(StubEngine):
    """A stub whose inferences begin in pairs, and of which the long one ends last."""

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
        """Let the long inference end."""
        self._short_ended.set()


def test_stats_of_concurrent_callers_are_their_own() -> None:
    """Each caller is charged for its own inferences, not for those of the other."""
    engine = PairedStub()
    embedder = Embedder(StubTokenizer(), engine, token_budget=64, pace=ChunkSchedule(10, 1, 10, 10))
    short, long = EngineStats(), EngineStats()

    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(embedder.embed, batch_of(["word " * 20]), long)
        embedder.embed(batch_of(["a"]), short)
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


def test_stats_of_nothing_are_full() -> None:
    """A batch without inferences wasted nothing."""
    assert EngineStats().pack_fill_ratio == 1.0


def test_static_grouping_depends_on_the_batch_alone() -> None:
    """Two runs ask for the same rows, whatever the threads did."""
    texts = [f"text {i} " * (i % 17) for i in range(200)]
    asked = []

    for _ in range(2):
        engine = WideStub()
        embedder = static_embedder(FORMS[0], engine)
        embedder.embed(batch_of(texts))
        embedder.close()
        asked.append(sorted(engine.asked))

    assert asked[0] == asked[1]
