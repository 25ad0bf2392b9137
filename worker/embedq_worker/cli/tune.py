"""`embedq-worker tune`: measure layouts of the cores on this machine, and keep the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from embedq.errors import SettingsError
from embedq.protocol.contract import Accuracy, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq_worker.engines.base import Engine
from embedq_worker.inference.embedder import CANARY_TEXT, Embedder
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.selection import (
    DEFAULT_TOKEN_BUDGET,
    Candidate,
    CpuConfig,
    CpuConfigs,
    Timing,
    TuningCache,
    decide,
    layouts,
    timings,
)
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import EngineChoice, WorkerSettings

#: On a busy machine it ends after so many times the seconds asked for, at least so many seconds.
PATIENCE: Final = 3


LEAST_PATIENCE_S: Final = 10.0


#: Rounds without which nothing is decided, and beyond which nothing is learnt.
MIN_ROUNDS: Final = 5


MAX_ROUNDS: Final = 15


Tell = Callable[[str], None]


class Wanted(NamedTuple):
    """What a person asked for.

    Attributes:
        accuracy: the class whose engine is tuned.
        reserve: cores left to the producer and Redis.
        texts: embedded in each round.
        seconds: after which no further round begins, but for the least number of them.
    """

    accuracy: Accuracy = Accuracy.STANDARD
    reserve: int = 0
    texts: int = 128
    seconds: float = 60.0


class Result(NamedTuple):
    """What was measured and kept.

    Attributes:
        engine: its name and precision.
        texts: of each round.
        timings: of each layout; the first is the usual one.
        chosen: what is used from now on.
        kept: whether it could be written down.
    """

    engine: str
    texts: int
    timings: tuple[Timing, ...]
    chosen: CpuConfig
    kept: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        rows = [
            {
                **each.layout.entry(),
                "docs_per_second": round(self.texts / _median(each), 1),
                "gain": round(each.gain, 4),
                "noise": round(each.noise, 4),
                "rounds": len(each.seconds),
            }
            for each in self.timings
        ]
        chosen = self.chosen.entry()
        return {"engine": self.engine, "layouts": rows, "chosen": chosen, "kept": self.kept}

    def lines(self) -> Iterator[str]:
        """Yield a table."""
        yield f"{self.engine}, {len(self.timings[0].seconds)} rounds of {self.texts} texts"
        yield "streams  cores  tokens  docs/s    gain   noise"
        for each in self.timings:
            layout = each.layout
            mark = "  <- chosen" if layout == self.chosen else ""
            yield (
                f"{layout.streams:>7}  {layout.cores:>5}  {layout.token_budget:>6}  "
                f"{self.texts / _median(each):>6.0f}  {each.gain:>+6.1%}  {each.noise:>6.1%}{mark}"
            )
        if self.chosen == self.timings[0].layout:
            yield "Nothing beats the usual layout by more than noise."
        yield (
            "Kept for this machine; EMBEDQ_THREADS, EMBEDQ_STREAMS and EMBEDQ_TOKEN_BUDGET win."
            if self.kept
            else "Not kept: the cache cannot be written; the log says why."
        )
        yield "A producer and Redis on the same machine want a core for each 5,500 short texts/s: "
        yield "where the engine is that fast, leave them one with --reserve-cores 1."


def run(settings: WorkerSettings, wanted: Wanted, tell: Tell) -> Result:
    """Measure and keep.

    Raises:
        SettingsError: there is nothing to tune.
        ModelError, EngineError: an engine cannot be opened or proven.
    """
    model = find_model(settings)
    cores = settings.cores() - wanted.reserve
    if model is None or settings.threads or settings.streams or settings.token_budget:
        raise SettingsError(
            "tune looks for what EMBEDQ_THREADS, EMBEDQ_STREAMS and EMBEDQ_TOKEN_BUDGET would fix, "
            "on a device that is no stub. Unset them."
        )
    if cores < 1:
        raise SettingsError(
            f"--reserve-cores {wanted.reserve} leaves none of {settings.cores()} cores."
        )
    opener = EngineOpener(settings, model)
    is_int8 = wanted.accuracy is Accuracy.INT8
    first = opener.open_int8() if is_int8 else opener.open_cpu(wanted.accuracy)
    one = Candidate(EngineChoice(first.engine.name), first.engine.precision)
    first.close()
    found = _measure(opener, model, one, layouts(cores, DEFAULT_TOKEN_BUDGET), wanted, tell)
    enough = len(found[0].seconds) >= MIN_ROUNDS
    chosen = decide(found, found[0].layout) if enough else found[0].layout
    if not enough:
        tell("Too few rounds in the time: the machine is busy. Tune it while it is idle.")
    key = CpuConfigs(settings, model).key(one, wanted.accuracy)
    kept = TuningCache(settings.cache_dir).put_entry(key, chosen.entry())
    return Result(f"{one.engine} {one.precision}", wanted.texts, tuple(found), chosen, kept)


def _measure(
    opener: EngineOpener,
    model: Model,
    one: Candidate,
    tried: Sequence[CpuConfig],
    wanted: Wanted,
    tell: Tell,
) -> list[Timing]:
    """Time all layouts in turn, round after round; engines of as many streams are shared."""
    engines: dict[int, Engine] = {}
    embedders: dict[CpuConfig, Embedder] = {}
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    try:
        for layout in tried:
            if layout.streams not in engines:
                engines[layout.streams] = opener.open_layout(one, layout)
            engine = engines[layout.streams]
            embedders[layout] = Embedder(tokenizer, engine, token_budget=layout.token_budget)
        return timings(_rounds(embedders, model, wanted, tell), tried[0])
    finally:
        for embedder in embedders.values():
            embedder.close()
        for engine in engines.values():
            engine.close()


def _rounds(
    embedders: Mapping[CpuConfig, Embedder], model: Model, wanted: Wanted, tell: Tell
) -> dict[CpuConfig, list[float]]:
    # Texts of 21 to 105 tokens, in no order, as docstrings are.
    texts = [CANARY_TEXT * (1 + 7 * i % 5) for i in range(wanted.texts)]
    batch = EmbedBatch("tune", 0, texts, VectorSpec(model.identity, model.dim, model.max_length))
    seconds: dict[CpuConfig, list[float]] = {layout: [] for layout in embedders}
    for embedder in embedders.values():  # the first inferences of an engine allocate
        embedder.embed(batch)
    deadline = time.monotonic() + wanted.seconds
    last = time.monotonic() + max(PATIENCE * wanted.seconds, LEAST_PATIENCE_S)
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() >= deadline:
            break
        if done and time.monotonic() >= last:
            break
        for layout, embedder in embedders.items():
            began = time.perf_counter()
            embedder.embed(batch)
            seconds[layout].append(time.perf_counter() - began)
        tell(f"round {done + 1}: {len(embedders)} layouts measured")
    return seconds


def _median(timing: Timing) -> float:
    return sorted(timing.seconds)[len(timing.seconds) // 2]
