"""A short race between engines on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, TypeVar

from embedq.contract import VectorSpec
from embedq.message import EmbedBatch
from embedq_worker import canary
from embedq_worker.embedder import Embedder
from embedq_worker.models import Model

Key = TypeVar("Key")

#: What they embed: 32 texts of 21 to 105 tokens. Three rounds, of which the best counts.
TEXTS: Final = tuple(canary.TEXT * (1 + i % 5) for i in range(32))
ROUNDS: Final = 3


def race(embedders: Mapping[Key, Embedder], model: Model) -> dict[Key, float]:
    """Return the seconds each needs, taken in turn, so that a drift of the machine meets all.

    Raises:
        EngineError: one of them fails.
    """
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    batch = EmbedBatch("race", 0, TEXTS, spec)
    seconds = dict.fromkeys(embedders, float("inf"))
    for _ in range(ROUNDS):
        for key, embedder in embedders.items():
            began = time.perf_counter()
            embedder.embed(batch)
            seconds[key] = min(seconds[key], time.perf_counter() - began)
    return seconds
