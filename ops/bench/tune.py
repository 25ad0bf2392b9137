"""Measure CPU configurations of the engine on this machine and print the settings to set.

    ops/bench/tune.py [--accuracy standard] [--cores 8] [--texts 256] [--rounds 9] [--quick]

Model, engine and precision are those that a worker with this environment would use.
Every round runs all configurations, so that a drift of the machine affects all of them.
The default wins unless another one gains more than 3 % and more than the spread of its rounds.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final

from common import Table, in_turn, options, parse, report
from corpus import CORPORA

from embedq.errors import EmbedqError, SettingsError
from embedq.protocol.contract import Accuracy, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.selection import DEFAULT_TOKEN_BUDGET, CpuConfig
from embedq_worker.inference.serving import VerifiedEngine
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import DeviceChoice, EngineChoice, PrecisionChoice, WorkerSettings

#: Values of EMBEDQ_TOKEN_BUDGET that are measured, the default first.
BUDGETS: Final = (DEFAULT_TOKEN_BUDGET, 256, 1024, 2048)
#: Minimum gain over the default configuration.
MIN_GAIN: Final = 0.03


def configs(cores: int) -> list[CpuConfig]:
    """List the configurations to measure, the default first."""
    streams = sorted({cores, max(1, cores // 2), 1}, reverse=True)
    return [CpuConfig(cores, *pair) for pair in itertools.product(streams, BUDGETS)]


def compare(default: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the median gain in speed over the default and half of its interquartile range.

    Args:
        default, other: seconds of each round.
    """
    gains = [before / after - 1 for before, after in zip(default, other, strict=True)]
    low, _, high = statistics.quantiles(gains, n=4) if len(gains) > 1 else (0.0, 0.0, 0.0)
    return statistics.median(gains), (high - low) / 2


def open_engine(settings: WorkerSettings, model: Model, accuracy: Accuracy) -> VerifiedEngine:
    """Open and verify the engine that a worker with these settings serves the class with."""
    opener = EngineOpener(settings, model)
    return opener.open_int8() if accuracy is Accuracy.INT8 else opener.open_cpu(accuracy)


def measure(
    settings: WorkerSettings, model: Model, accuracy: Accuracy, texts: list[str], rounds: int
) -> tuple[str, Mapping[CpuConfig, list[float]]]:
    """Return the name of the engine and the seconds of each configuration per round."""
    chosen = open_engine(settings, model, accuracy)
    name, precision = chosen.engine.name, str(chosen.engine.precision)
    chosen.close()
    pinned = {"engine": EngineChoice(name), "precision": PrecisionChoice(precision)}
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)
    batch = EmbedBatch("tune", 0, texts, VectorSpec(model.identity, model.dim, model.max_length))
    runs: dict[str, Callable[[], float]] = {}
    tried = configs(settings.cores())
    with ExitStack() as stack:
        engines: dict[int, VerifiedEngine] = {}
        for config in tried:
            if config.streams not in engines:
                update = {**pinned, "threads": config.cores, "streams": config.streams}
                opened = open_engine(settings.model_copy(update=update), model, accuracy)
                stack.callback(opened.close)
                engines[config.streams] = opened
            engine = engines[config.streams].engine
            embedder = Embedder(tokenizer, engine, token_budget=config.token_budget)
            stack.callback(embedder.close)
            embedder.embed(batch)  # the first inferences allocate memory
            runs[config.describe()] = lambda embedder=embedder: seconds(embedder, batch)  # type: ignore[misc] # the default binds the loop variable
        found = in_turn(rounds, runs)
    return f"{name} {precision}", {config: found[config.describe()] for config in tried}


def seconds(embedder: Embedder, batch: EmbedBatch) -> float:
    """Embed a batch and return the seconds it took."""
    began = time.perf_counter()
    embedder.embed(batch)
    return time.perf_counter() - began


def main() -> None:
    """Run the command line."""
    parser = options("tune", __doc__ or "", rounds=9)
    parser.add_argument(
        "--accuracy", type=Accuracy, choices=list(Accuracy), default=Accuracy.STANDARD,
        help="accuracy class whose engine is measured (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--cores", type=int, default=0, help="cores of the engine; 0 = all")
    parser.add_argument("--texts", type=int, default=256, help="texts per round (%(default)s)")
    parser.add_argument("--corpus", choices=CORPORA, default="docstrings", help="%(default)s")
    args = parse(parser)
    try:
        settings = WorkerSettings.load()
        model = find_model(settings)
        if model is None or settings.threads or settings.streams or settings.token_budget:
            raise SettingsError(
                "EMBEDQ_DEVICE=stub, EMBEDQ_THREADS, EMBEDQ_STREAMS and EMBEDQ_TOKEN_BUDGET leave "
                "nothing to measure. Unset them; use --cores to measure fewer cores."
            )
        update = {"device": DeviceChoice.CPU, "threads": args.cores}
        settings = settings.model_copy(update=update)
        texts = CORPORA[args.corpus](8 if args.quick else args.texts)
        engine, found = measure(settings, model, args.accuracy, texts, args.rounds)
    except EmbedqError as error:
        sys.exit(f"embedq: {error}")
    best = default = next(iter(found))
    best_gain = MIN_GAIN
    rows: list[list[str | float]] = []
    for config, times in found.items():
        gain, spread = compare(found[default], times)
        if gain > max(best_gain, spread):
            best, best_gain = config, gain
        texts_per_s = len(texts) / statistics.median(times)
        rows.append([config.describe(), texts_per_s, f"{gain:+.1%}", f"{spread:.1%}"])
    chosen = {
        "EMBEDQ_THREADS": best.cores,
        "EMBEDQ_STREAMS": best.streams,
        "EMBEDQ_TOKEN_BUDGET": best.token_budget,
    }
    verdict = (
        "No configuration is clearly faster than the default, which is:"
        if best is default
        else f"{best_gain:+.1%} over the default. Set:"
    )
    table = Table(
        f"CPU configurations of {engine}, {args.accuracy}",
        ["configuration", "texts/s", "gain", "spread"],
        rows,
        plot="texts/s",
        notes=[verdict, *(f"  {name}={value}" for name, value in chosen.items())],
        more={"settings": chosen},
    )
    report(args, table)


if __name__ == "__main__":
    main()
