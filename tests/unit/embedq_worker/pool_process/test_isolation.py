"""Tests of isolation mode: which texts are dead-lettered and which vectors are returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.support.models import WORDS, real_model
from tests.support.stub_batches import stub_batch

from embedq.protocol.contract import Code, Device, Outcome, Precision, Status, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import OutcomeTable, Vectors
from embedq.testing import stub_vectors
from embedq_worker.engines.factory import open_engine
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
BATCH = stub_batch(TEXTS)


class Attempts:
    """Attempts in memory."""

    def __init__(self, points: dict[int, int] | None = None) -> None:
        self.points = points or {}
        self.dead_lettered: list[int] = []

    def count_deaths(self) -> dict[int, int]:
        return dict(self.points)

    def start(self, offset: int) -> None:
        pass

    def end(self, offset: int, *, cleared: bool) -> None:
        if cleared:
            self.points.pop(offset, None)

    def add_points(self, offset: int, points: int) -> None:
        self.points[offset] = self.points.get(offset, 0) + points

    def dead_letter(self, offset: int, reason: str) -> None:
        self.dead_lettered.append(offset)


def embed_function(
    is_failing: Callable[[str], bool],
) -> Callable[[EmbedBatch, bool], tuple[Vectors, OutcomeTable]]:
    """Return an embed function that raises on some texts."""

    def embed(batch: EmbedBatch, _on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        rows = [row for row in range(len(batch.texts)) if row not in batch.refused]
        if any(is_failing(batch.texts[row]) for row in rows):
            raise EngineError("It failed.")
        good = Outcome(status=Status.OK, device=Device.STUB, precision=Precision.F32)
        outcomes = [
            Outcome(status=Status.FAILED, code=batch.refused[row]) if row in batch.refused else good
            for row in range(len(batch.texts))
        ]
        # Like a device whose sums depend on the number of texts in a token batch.
        return stub_vectors(batch.texts) / np.float32(len(rows)), OutcomeTable.from_outcomes(
            outcomes
        )

    return embed


def test_text_that_always_fails_is_dead_lettered() -> None:
    attempts = Attempts()

    vectors, outcomes = embed_isolated(
        BATCH, embed_function(lambda text: text == "second"), attempts
    )

    assert attempts.dead_lettered == [1]
    assert outcomes[1].code == Code.SET_ASIDE
    assert np.array_equal(vectors[[0, 2]], stub_vectors(["first", "third"]) / np.float32(2))


def test_no_text_is_charged_when_every_text_fails() -> None:
    attempts = Attempts()

    with pytest.raises(EngineError):
        embed_isolated(BATCH, embed_function(lambda text: True), attempts)

    assert attempts.points == {}
    assert attempts.dead_lettered == []


def test_successful_text_is_cleared() -> None:
    attempts = Attempts({0: MAX_POINTS - OUTSIDE_POINTS})

    vectors, _ = embed_isolated(BATCH, embed_function(lambda text: False), attempts)

    assert attempts.points == {}
    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_isolated_batch_is_bit_identical() -> None:
    expected, _ = embed_function(lambda text: False)(BATCH, False)

    vectors, outcomes = embed_isolated(BATCH, embed_function(lambda text: False), Attempts())

    assert vectors.tobytes() == expected.tobytes()
    assert outcomes.count_failed() == 0


@pytest.mark.parametrize("offset", [1, len(TEXTS)])
def test_text_or_batch_that_ended_a_process_is_embedded_one_by_one(offset: int) -> None:
    attempts = Attempts({offset: OWN_POINTS})

    vectors, _ = embed_isolated(BATCH, embed_function(lambda text: False), attempts)

    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_texts_that_only_fail_together_get_their_vectors() -> None:
    working = embed_function(lambda text: False)

    def embed(batch: EmbedBatch, on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        if len(batch.texts) > 1:
            raise EngineError("It failed.")
        return working(batch, on_cpu)

    vectors, _ = embed_isolated(BATCH, embed, Attempts())

    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_device_fault_of_the_whole_batch_propagates() -> None:
    working = embed_function(lambda text: False)

    def embed(batch: EmbedBatch, on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        if len(batch.texts) > 1:
            raise DeviceFault(InferFailed("Wrong.", FailureReason.WRONG_CANARY))
        return working(batch, on_cpu)

    with pytest.raises(DeviceFault):
        embed_isolated(BATCH, embed, Attempts())


@pytest.mark.model
def test_isolated_batch_of_a_real_engine_is_bit_identical() -> None:
    model = real_model()
    engine = open_engine("onnxruntime", model, 1)
    embedder = Embedder(Tokenizer(model.tokenizer_path, model.max_length), engine, token_budget=512)
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    batch = EmbedBatch("job", 0, [" ".join(WORDS[: 1 + i % 10]) for i in range(40)], spec)
    expected, _ = embedder.embed(batch)

    isolated, outcomes = embed_isolated(batch, lambda each, _: embedder.embed(each), Attempts())
    alone = np.concatenate([embedder.embed(replace(batch, texts=[t]))[0] for t in batch.texts])
    embedder.close()
    engine.close()

    assert isolated.tobytes() == expected.tobytes()
    assert outcomes.count_failed() == 0
    assert alone.tobytes() != expected.tobytes()
    assert (alone * expected).sum(axis=1).min() >= 0.99999


def test_text_that_ended_three_processes_is_dead_lettered_untried() -> None:
    attempts = Attempts({2: 3 * OWN_POINTS})

    embed_isolated(BATCH, embed_function(lambda text: text == "third"), attempts)

    assert attempts.dead_lettered == [2]
