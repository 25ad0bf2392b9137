"""A short race between engines on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, TypeVar

from embedq.contract import VectorSpec
from embedq.message import EmbedBatch
from embedq_worker import canary
from embedq_worker.embedder import Embedder
from embedq_worker.models import Model

Key = TypeVar("Key")

_WORDS: Final = canary.TEXT.split() * 20
#: What they embed: 128 texts of 5 to 200 words, most of them short and few of equal length, as
#: prose has them; about as much as a batch of real work keeps all cores at full token batches
#: with. With a quarter of it the tail decided, and noise. With five lengths only, onnxruntime had
#: nothing to pad and won by 0.3 %, and with docstrings it was 8 % behind (f32, two Zen 4 cores,
#: measured 2026-11-28).
TEXTS: Final = tuple(" ".join(_WORDS[: round(5 * 40 ** (i / 127))]) for i in range(128))
#: Raised whenever another race may have another winner, so that it is run again.
RACE_VERSION: Final = 2
#: The best of so many rounds counts: others can only make an engine slower.
ROUNDS: Final = 4
#: An engine whose best is so many times that of the fastest is out of the race.
HOPELESS: Final = 1.4


def race(
    embedders: Mapping[Key, Embedder],
    model: Model,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """Return the seconds each needs, taken in turn, so that a drift of the machine meets all.

    Raises:
        EngineError: one of them fails.
    """
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    batch = EmbedBatch("race", 0, TEXTS, spec)
    seconds: dict[Key, float] = {}
    running = dict(embedders)
    for _ in range(ROUNDS):
        for key, embedder in running.items():
            began = clock()
            embedder.embed(batch)
            seconds[key] = min(seconds.get(key, float("inf")), clock() - began)
        limit = HOPELESS * min(seconds.values(), default=0.0)
        running = {key: each for key, each in running.items() if seconds[key] <= limit}
    return seconds
