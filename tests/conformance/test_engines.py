"""Tests that every engine must pass. A new engine is added by its name in TOLERANCES."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support.models import WORDS, real_model, tiny_model
from tests.support.npu_emulation import EngineProcess, RemoteEngine, target_of

from embedq.protocol.contract import Device, Precision, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import Vectors
from embedq_worker.engines.base import AnyTokenizer, Engine, RowSpec, TokenBatch
from embedq_worker.engines.factory import ENGINES, open_engine
from embedq_worker.engines.stub import StubEngine, StubTokenizer
from embedq_worker.errors import CompileFailed, InferFailed, ModelError
from embedq_worker.inference import selftest
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.packing import build_padded, build_rows
from embedq_worker.inference.planning import ChunkSchedule, plan_rows
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model

TEXTS = [" ".join(WORDS[i % 5 : i % 12]) + " x" * (i % 7) for i in range(60)]

#: Maximum difference of a component between a text embedded alone and with other texts.
TOLERANCES = {
    "stub": 0.0,
    "onnxruntime": 1e-5,
    "onnxruntime packed": 1e-5,
    "openvino f32": 1e-5,
    "openvino f32 packed": 1e-5,
    "openvino bf16": 2e-2,
    "alias": 2e-3,
    "npuw": 2e-2,
    "shim": 2e-3,
}
EMULATED_NPUS = ("alias", "npuw", "shim")


@dataclass(frozen=True)
class Subject:
    """An engine under test, the tokenizer of its model and its row format."""

    engine: Engine
    tokenizer: AnyTokenizer
    model: Model | None
    tolerance: float
    row_spec: RowSpec

    def embedder(self, token_budget: int = 64) -> Embedder:
        """Return an embedder with small token batches and chunks."""
        schedule = ChunkSchedule(16, 1, 16, 16)
        return Embedder(
            self.tokenizer,
            self.engine,
            token_budget=token_budget,
            schedule=schedule,
            row_spec=self.row_spec,
        )

    def token_batches(self, texts: list[str], size: int) -> list[TokenBatch]:
        """Group texts as this engine requires, or in groups of `size` texts."""
        tokens, pad_id = self.tokenizer.tokenize(texts), self.tokenizer.pad_id
        if self.row_spec.is_static:
            plan = plan_rows(tokens.lengths, self.row_spec)
            return build_rows(tokens, plan, pad_id, self.row_spec)
        groups = [range(at, min(at + size, len(texts))) for at in range(0, len(texts), size)]
        return [build_padded(tokens, group, pad_id) for group in groups]


def open_bf16(model: Model) -> Engine:
    """Open OpenVINO in bf16, or skip on a CPU without it."""
    try:
        return open_engine("openvino", model, 2, Precision.BF16)
    except CompileFailed as error:
        pytest.skip(str(error))


def open_subject(name: str, model: Model, folder: Path) -> Engine:
    """Open an engine by its name in TOLERANCES, or skip with the reason."""
    if name in EMULATED_NPUS:
        return RemoteEngine(EngineProcess(), target_of(name), model, folder / "cache")
    if name == "openvino bf16":
        return open_bf16(model)
    return open_engine(name.split()[0], model, 2)


@pytest.fixture(scope="module", params=TOLERANCES)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    """Open each engine with a tiny model, the stub without one."""
    name = str(request.param)
    folder = tmp_path_factory.mktemp("subject")
    model = None if name == "stub" else tiny_model(folder)
    tokenizer: AnyTokenizer = StubTokenizer()
    engine: Engine = StubEngine()
    if model:
        tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
        engine = open_subject(name, model, folder)
    row_spec = RowSpec.packed(model.max_length) if model and "packed" in name else engine.row_spec
    yield Subject(engine, tokenizer, model, TOLERANCES[name], row_spec)
    engine.close()


def embed(subject: Subject, texts: list[str], token_budget: int = 64) -> Vectors:
    spec = VectorSpec("0" * 64, subject.engine.dim, subject.tokenizer.max_length)
    embedder = subject.embedder(token_budget)
    try:
        return embedder.embed(EmbedBatch("job", 0, texts, spec))[0]
    finally:
        embedder.close()


def test_engine_has_name_device_precision_dim_and_concurrency(subject: Subject) -> None:
    engine = subject.engine

    assert engine.name in ENGINES
    assert isinstance(engine.device, Device)
    assert isinstance(engine.precision, Precision)
    assert engine.dim > 0
    assert engine.concurrency > 0


def test_vectors_have_the_shape_of_the_batch_and_unit_length(subject: Subject) -> None:
    for batch in subject.token_batches(TEXTS[:5], 5):
        vectors = subject.engine.infer(batch)

        assert vectors.shape == (*batch.members.shape, subject.engine.dim)
        assert vectors.dtype == np.float32
        lengths = np.linalg.norm(vectors[batch.members >= 0], axis=-1)
        assert np.abs(lengths - 1).max() < 1e-5


def test_repeated_batch_is_bit_identical(subject: Subject) -> None:
    first = embed(subject, TEXTS)

    for _ in range(3):
        assert embed(subject, TEXTS).tobytes() == first.tobytes()


def test_vector_is_independent_of_the_other_texts(subject: Subject) -> None:
    among_others = embed(subject, TEXTS)

    wide = embed(subject, TEXTS, token_budget=1024)
    alone = np.concatenate([embed(subject, [text]) for text in TEXTS[:10]])

    assert np.abs(wide - among_others).max() <= subject.tolerance
    assert np.abs(alone - among_others[:10]).max() <= subject.tolerance


def test_reversed_texts_give_reversed_vectors(subject: Subject) -> None:
    forward = embed(subject, TEXTS)

    backward = embed(subject, TEXTS[::-1])

    assert np.abs(backward[::-1] - forward).max() <= subject.tolerance


def test_concurrent_callers_get_their_own_vectors(subject: Subject) -> None:
    batches = subject.token_batches(TEXTS, 6)
    expected = [subject.engine.infer(batch).tobytes() for batch in batches]

    with ThreadPoolExecutor(4) as pool:
        found = [vectors.tobytes() for vectors in pool.map(subject.engine.infer, batches * 3)]

    assert found == expected * 3


def test_empty_and_too_long_text_have_vectors_of_unit_length(subject: Subject) -> None:
    vectors = embed(subject, ["", " ".join(WORDS) * 100])

    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_engine_passes_the_self_test(subject: Subject) -> None:
    embedder = subject.embedder(token_budget=512)
    report = selftest.run(embedder, subject.model)
    embedder.close()

    assert report.passed, report.reason


def test_vectors_agree_with_padded_onnxruntime_in_f32(subject: Subject) -> None:
    if subject.model is None:
        pytest.skip("the stub has no reference; its own tests compare it with the producer's")
    onnxruntime = open_engine("onnxruntime", subject.model, 2)
    tolerance = 2e-5 if subject.engine.precision is Precision.F32 else 5e-2
    reference = Subject(
        onnxruntime, subject.tokenizer, subject.model, tolerance, onnxruntime.row_spec
    )

    found, expected = embed(subject, TEXTS), embed(reference, TEXTS)
    onnxruntime.close()

    assert np.abs(found - expected).max() <= tolerance
    assert (found * expected).sum(axis=1).min() >= 0.999


@pytest.mark.model
@pytest.mark.parametrize("name", ["onnxruntime", "openvino f32", "onnxruntime packed"])
def test_engine_returns_published_vectors(name: str, tmp_path: Path) -> None:
    """Components and sums that FastEmbed and fastembed-rs publish for all-MiniLM-L6-v2."""
    # Sources: FastEmbed tests/test_text_onnx_embeddings.py (tolerance 1e-3) and fastembed-rs
    # tests/text-embeddings.rs (1e-2). The limits here are tighter.
    sums = {
        "Hello, World!": 0.59605527,
        "This is an example passage.": 0.36542925,
        "fastembed-rs is licensed under Apache-2.0": -0.16450031,
        "Some other short text here blah blah blah": -0.40903988,
    }
    model = real_model()
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    engine = open_subject(name, model, tmp_path)
    row_spec = RowSpec.packed(model.max_length) if "packed" in name else engine.row_spec
    subject = Subject(engine, tokenizer, model, 1e-5, row_spec)

    vectors = embed(subject, ["hello world", *sums])
    subject.engine.close()

    hello = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]
    assert np.abs(vectors[0, :5] - hello).max() < 1e-5
    assert np.abs(vectors[1:].sum(axis=1) - list(sums.values())).max() < 1e-5


@pytest.mark.model
@pytest.mark.parametrize(
    "row_spec", [RowSpec.packed(256), RowSpec.shared(256)], ids=lambda f: f.format
)
def test_packed_rows_agree_with_padded_rows(row_spec: RowSpec) -> None:
    texts = [doc for each in vars(builtins).values() if (doc := each.__doc__)][:24]
    model = real_model()
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)

    def run(engine: Engine, row_spec: RowSpec) -> Vectors:
        return embed(Subject(engine, tokenizer, model, 0.0, row_spec), texts, 512)

    with closing(open_engine("onnxruntime", model, 2)) as engine:
        padded, by_onnxruntime = run(engine, RowSpec()), run(engine, row_spec)
    with closing(open_engine("openvino", model, 2)) as engine:
        by_openvino = run(engine, row_spec)
    assert np.abs(by_onnxruntime - padded).max() <= 2e-5
    assert np.abs(by_openvino - padded).max() <= 2e-5
    with closing(open_bf16(model)) as engine:
        by_bf16 = run(engine, row_spec)
    assert (by_bf16 * padded).sum(axis=1).min() >= 0.999


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_closed_engine_raises_infer_failed(name: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    engine = open_engine(name, model, threads=1)
    tokens = Tokenizer(model.tokenizer_path, model.max_length).tokenize(["the queue"])
    engine.close()

    with pytest.raises(InferFailed, match="closed"):
        engine.infer(build_padded(tokens, [0], 0))


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_overwritten_model_file_does_not_change_an_open_engine(name: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    tokens = Tokenizer(model.tokenizer_path, model.max_length).tokenize(["the queue"])
    batch = build_padded(tokens, [0], 0)

    with closing(open_engine(name, model, threads=1)) as engine:
        before = engine.infer(batch)
        with model.weights.open("r+b") as file:
            file.write(bytes(model.weights.stat().st_size))
        after = engine.infer(batch)

    assert np.array_equal(after, before)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_open_engines_of_a_model_share_its_weights(name: str, tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    first = open_engine(name, model, threads=1)
    model.weights.unlink()
    open_engine(name, model, threads=1).close()
    first.close()

    with pytest.raises(ModelError):
        open_engine(name, model, threads=1)


def test_bf16_is_refused_on_a_cpu_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # OpenVINO accepts the bf16 hint on every CPU with AVX-512 and emulates it if the CPU lacks
    # bf16.
    pytest.importorskip("openvino")
    from embedq_worker.engines.openvino_runtime import Runtime

    runtime_get = Runtime.get
    monkeypatch.setattr(
        Runtime, "get", lambda self, name: runtime_get(self, name).replace("BF16", "")
    )

    with pytest.raises(CompileFailed, match="This CPU has no bf16"):
        open_engine("openvino", tiny_model(tmp_path), 2, Precision.BF16)
