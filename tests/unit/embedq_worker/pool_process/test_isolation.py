"""Isolation mode blames a text only for what the text did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.support.models import WORDS, real_model

from embedq.protocol.contract import Code, Device, Outcome, Precision, Status, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import OutcomeTable, Vectors
from embedq.testing import STUB_DIM, stub_vectors
from embedq_worker.engines.factory import open_engine
from embedq_worker.engines.stub import STUB_IDENTITY, STUB_MAX_LENGTH
from embedq_worker.errors import EngineError, FailureReason, InferFailed
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.pool_process.isolation import (
    MAX_POINTS,
    OUTSIDE_POINTS,
    OWN_POINTS,
    DeviceFault,
    embed_isolated,
)

TEXTS = ["first", "second", "third"]
BATCH = EmbedBatch("job", 0, TEXTS, VectorSpec(STUB_IDENTITY, STUB_DIM, STUB_MAX_LENGTH), {})


class Notebook:
    """Notes in memory."""

    def __init__(self, charges: dict[int, int] | None = None) -> None:
        self.points = charges or {}
        self.aside: list[int] = []

    def charges(self) -> dict[int, int]:
        """Return the points as they are."""
        return dict(self.points)

    def start(self, offset: int) -> None:
        """Do nothing: nobody dies here."""

    def end(self, offset: int, *, cleared: bool) -> None:
        """Forget the points of a cleared text."""
        if cleared:
            self.points.pop(offset, None)

    def charge(self, offset: int, points: int) -> None:
        """Add points."""
        self.points[offset] = self.points.get(offset, 0) + points

    def dead_letter(self, offset: int, reason: str) -> None:
        """Keep the offset."""
        self.aside.append(offset)


def engine(
    fails: Callable[[str], bool],
) -> Callable[[EmbedBatch, bool], tuple[Vectors, OutcomeTable]]:
    """Return an engine that raises on some texts."""

    def embed(batch: EmbedBatch, _on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        rows = [row for row in range(len(batch.texts)) if row not in batch.refused]
        if any(fails(batch.texts[row]) for row in rows):
            raise EngineError("It failed.")
        good = Outcome(status=Status.OK, device=Device.STUB, precision=Precision.F32)
        outcomes = [
            Outcome(status=Status.FAILED, code=batch.refused[row]) if row in batch.refused else good
            for row in range(len(batch.texts))
        ]
        # As a device whose sums depend on how many share a token batch.
        return stub_vectors(batch.texts) / np.float32(len(rows)), OutcomeTable.from_outcomes(
            outcomes
        )

    return embed


def test_text_that_always_fails_is_set_aside() -> None:
    """Three failures of its own are enough; its neighbors have their vectors."""
    notes = Notebook()

    vectors, outcomes = embed_isolated(BATCH, engine(lambda text: text == "second"), notes)

    assert notes.aside == [1]
    assert outcomes[1].code == Code.SET_ASIDE
    assert np.array_equal(vectors[[0, 2]], stub_vectors(["first", "third"]) / np.float32(2))


def test_engine_that_fails_everything_blames_no_text() -> None:
    """A harmless text fails as well, so the device is at fault and nobody is charged."""
    notes = Notebook()

    with pytest.raises(EngineError):
        embed_isolated(BATCH, engine(lambda text: True), notes)

    assert notes.points == {}
    assert notes.aside == []


def test_text_under_suspicion_is_cleared_by_its_vector() -> None:
    """Whatever ended the processes before: a text that is embedded is innocent."""
    notes = Notebook({0: MAX_POINTS - OUTSIDE_POINTS})

    vectors, _ = embed_isolated(BATCH, engine(lambda text: False), notes)

    assert notes.points == {}
    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_unlucky_batch_has_the_bytes_of_any_other_run() -> None:
    """Texts that are good alone are embedded together, as they are where nothing was killed."""
    expected, _ = engine(lambda text: False)(BATCH, False)

    vectors, outcomes = embed_isolated(BATCH, engine(lambda text: False), Notebook())

    assert vectors.tobytes() == expected.tobytes()
    assert outcomes.count_failed() == 0


@pytest.mark.parametrize("offset", [1, len(TEXTS)])
def test_what_ended_a_process_is_not_put_together_again(offset: int) -> None:
    """A text that once ended a process, or the whole batch that did, costs no second one."""
    notes = Notebook({offset: OWN_POINTS})

    vectors, _ = embed_isolated(BATCH, engine(lambda text: False), notes)

    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_texts_that_only_fail_together_have_their_vectors() -> None:
    """An engine that fails the batch and none of its texts costs the batch nothing."""
    sound = engine(lambda text: False)

    def embed(batch: EmbedBatch, on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        if len(batch.texts) > 1:
            raise EngineError("It failed.")
        return sound(batch, on_cpu)

    vectors, _ = embed_isolated(BATCH, embed, Notebook())

    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_device_that_fails_all_together_is_not_trusted_with_each_alone() -> None:
    """The worker must hear of it and hand the batch on: a wrong canary speaks of every vector."""
    sound = engine(lambda text: False)

    def embed(batch: EmbedBatch, on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        if len(batch.texts) > 1:
            raise DeviceFault(InferFailed("Wrong.", FailureReason.WRONG_CANARY))
        return sound(batch, on_cpu)

    with pytest.raises(DeviceFault):
        embed_isolated(BATCH, embed, Notebook())


@pytest.mark.model
def test_real_engine_gives_an_unlucky_batch_the_same_bytes() -> None:
    """Alone, a text's sums differ in the last bits; isolation mode does not hand those out."""
    model = real_model()
    engine = open_engine("onnxruntime", model, 1)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    batch = EmbedBatch("job", 0, [" ".join(WORDS[: 1 + i % 10]) for i in range(40)], spec)
    expected, _ = embedder.embed(batch)

    careful, outcomes = embed_isolated(batch, lambda each, _: embedder.embed(each), Notebook())
    alone = np.concatenate([embedder.embed(replace(batch, texts=[t]))[0] for t in batch.texts])
    embedder.close()
    engine.close()

    assert careful.tobytes() == expected.tobytes()
    assert outcomes.count_failed() == 0
    assert alone.tobytes() != expected.tobytes()
    assert (alone * expected).sum(axis=1).min() >= 0.99999


def test_text_that_ended_three_processes_is_not_tried_again() -> None:
    """At the limit a text is set aside before it stops another process."""
    notes = Notebook({2: 3 * OWN_POINTS})

    embed_isolated(BATCH, engine(lambda text: text == "third"), notes)

    assert notes.aside == [2]
