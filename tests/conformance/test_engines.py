"""Every engine, the same questions. A new engine joins by adding its name to ENGINES."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from tests.model_fixtures import WORDS, real_model, tiny_model

from embedq.contract import Device, EmbedBatch, Precision, VectorSpec
from embedq_worker import selftest
from embedq_worker.embedder import Embedder
from embedq_worker.engines import ENGINES, Engine, open_engine
from embedq_worker.engines.stub import StubTokenizer
from embedq_worker.errors import InferFailed
from embedq_worker.models import Model
from embedq_worker.packing import build_padded
from embedq_worker.tokenization import Tokenizer
from embedq_worker.tokens import AnyTokenizer

#: Largest difference of a component between a text alone and in company.
TOLERANCE = 1e-5

TEXTS = [" ".join(WORDS[i % 5 : i % 12]) + " x" * (i % 7) for i in range(60)]


@dataclass(frozen=True)
class Subject:
    """An engine with the tokenizer of its model."""

    engine: Engine
    tokenizer: AnyTokenizer
    model: Model | None

    def embedder(self, token_budget: int = 64) -> Embedder:
        """Make an embedder with small token batches and chunks."""
        return Embedder(self.tokenizer, self.engine, token_budget=token_budget, chunk_texts=16)


@pytest.fixture(scope="module", params=ENGINES)
def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    """Each engine with a tiny model; the stub with none."""
    model = None
    tokenizer: AnyTokenizer = StubTokenizer()
    if request.param != "stub":
        model = tiny_model(tmp_path_factory.mktemp(str(request.param)))
        tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    engine = open_engine(str(request.param), model, threads=2)
    yield Subject(engine, tokenizer, model)
    engine.close()


def embed(subject: Subject, texts: list[str], token_budget: int = 64) -> npt.NDArray[np.float32]:
    """Embed texts as a node would."""
    spec = VectorSpec("0" * 64, subject.engine.dim, subject.tokenizer.max_length)
    embedder = subject.embedder(token_budget)
    try:
        return embedder.embed(EmbedBatch("job", 0, texts, spec))[0]
    finally:
        embedder.close()


def test_engine_describes_itself(subject: Subject) -> None:
    """Name, device, precision, dimension and concurrency are words and numbers of the contract."""
    engine = subject.engine

    assert engine.name in ENGINES
    assert isinstance(engine.device, Device)
    assert isinstance(engine.precision, Precision)
    assert engine.dim > 0
    assert engine.concurrency > 0


def test_vectors_have_shape_and_length(subject: Subject) -> None:
    """A padded token batch of n texts gives float32 [n, 1, D] of unit length."""
    tokens = subject.tokenizer.tokenize(TEXTS[:5])

    vectors = subject.engine.infer(build_padded(tokens, range(5), subject.tokenizer.pad_id))

    assert vectors.shape == (5, 1, subject.engine.dim)
    assert vectors.dtype == np.float32
    assert np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() < 1e-5


def test_same_batch_gives_the_same_bytes(subject: Subject) -> None:
    """Vectors are reproducible to the bit, whatever the threads did."""
    first = embed(subject, TEXTS)

    for _ in range(3):
        assert embed(subject, TEXTS).tobytes() == first.tobytes()


def test_company_does_not_change_a_vector(subject: Subject) -> None:
    """A text has the same vector alone, among others, and in token batches of another size."""
    together = embed(subject, TEXTS)

    wide = embed(subject, TEXTS, token_budget=1024)
    alone = np.concatenate([embed(subject, [text]) for text in TEXTS[:10]])

    assert np.abs(wide - together).max() <= TOLERANCE
    assert np.abs(alone - together[:10]).max() <= TOLERANCE


def test_order_of_texts_is_kept(subject: Subject) -> None:
    """Texts in reverse give vectors in reverse."""
    forward = embed(subject, TEXTS)

    backward = embed(subject, TEXTS[::-1])

    assert np.abs(backward[::-1] - forward).max() <= TOLERANCE


def test_many_threads_may_infer(subject: Subject) -> None:
    """Callers at once, more than the engine asked for, each get their own vectors."""
    tokens = subject.tokenizer.tokenize(TEXTS)
    batches = [
        build_padded(tokens, range(at, at + 6), subject.tokenizer.pad_id) for at in range(0, 60, 6)
    ]
    expected = [subject.engine.infer(batch).tobytes() for batch in batches]

    with ThreadPoolExecutor(4) as pool:
        found = [vectors.tobytes() for vectors in pool.map(subject.engine.infer, batches * 3)]

    assert found == expected * 3


def test_empty_and_longest_text_are_served(subject: Subject) -> None:
    """A text without words and one beyond the limit both have a finite vector of unit length."""
    vectors = embed(subject, ["", " ".join(WORDS) * 100])

    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-5


def test_engine_passes_the_self_test(subject: Subject) -> None:
    """What proves an engine before it serves accepts this one."""
    embedder = subject.embedder(token_budget=512)
    report = selftest.run(embedder, subject.model)
    embedder.close()

    assert report.passed, report.reason


@pytest.mark.model
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "stub"])
def test_engine_gives_published_vectors(name: str) -> None:
    """Components and sums that FastEmbed and fastembed-rs publish for all-MiniLM-L6-v2.

    Sources: FastEmbed tests/test_text_onnx_embeddings.py (1e-3), fastembed-rs
    tests/text-embeddings.rs (1e-2). Ours agree far better, so the limits here are tighter.
    """
    sums = {
        "Hello, World!": 0.59605527,
        "This is an example passage.": 0.36542925,
        "fastembed-rs is licensed under Apache-2.0": -0.16450031,
        "Some other short text here blah blah blah": -0.40903988,
    }
    model = real_model()
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    subject = Subject(open_engine(name, model, threads=2), tokenizer, model)

    vectors = embed(subject, ["hello world", *sums])
    subject.engine.close()

    hello = [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362]
    assert np.abs(vectors[0, :5] - hello).max() < 1e-5
    assert np.abs(vectors[1:].sum(axis=1) - list(sums.values())).max() < 1e-5


def test_closed_engine_says_so(tmp_path: Path) -> None:
    """A closed onnxruntime engine raises an error of ours, not a crash."""
    model = tiny_model(tmp_path)
    engine = open_engine("onnxruntime", model, threads=1)
    tokens = Tokenizer(model.tokenizer_path, model.max_length).tokenize(["the queue"])
    engine.close()

    with pytest.raises(InferFailed, match="closed"):
        engine.infer(build_padded(tokens, [0], 0))
