"""Measure the throughput end to end through Celery and Redis, against the same engine alone.

    ops/bench/queue_tax.py [--texts 4096] [--precisions f32 bf16] [--quick]

"Alone" is one batch of all texts in this process, with the same tokenizer, engine and cores. Each
run through the queue is compared with the mean of the runs before and after it, because the speed
of the machine drifts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
from common import (
    Table,
    add_precisions,
    by_precision,
    client_of,
    find_model,
    options,
    parse,
    report,
)
from corpus import CORPORA

from embedq.local.fleet import LocalFleet
from embedq.protocol.contract import Precision, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq_worker.engines.factory import open_engine
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.selection import DEFAULT_TOKEN_BUDGET
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model
from embedq_worker.settings import available_cores

#: Target of the ratio.
FLOOR = 0.97


def bracketed(
    rounds: int, alone: Callable[[], float], queue: Callable[[], float]
) -> tuple[list[float], list[float], list[float]]:
    """Run alone, queue, alone, ...; return the speeds of both and their ratios."""
    alones, queues = [alone()], []
    for _ in range(rounds):
        queues.append(queue())
        alones.append(alone())
    ratios = [
        queue / ((before + after) / 2)
        for queue, before, after in zip(queues, alones, alones[1:], strict=False)
    ]
    return alones, queues, ratios


def measure(model: Model, precision: Precision, texts: list[str], rounds: int) -> list[str | float]:
    """Return the table row of a precision."""
    engine = open_engine("openvino", model, available_cores(), precision)
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)
    embedder = Embedder(tokenizer, engine, token_budget=DEFAULT_TOKEN_BUDGET)
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    vectors: dict[str, np.ndarray] = {}

    def alone() -> float:
        began = time.perf_counter()
        vectors["alone"] = embedder.embed(EmbedBatch("bench", 0, texts, spec))[0]
        return len(texts) / (time.perf_counter() - began)

    environment = {"EMBEDQ_ENGINE": "openvino", "EMBEDQ_PRECISION": str(precision)}
    environment["EMBEDQ_DEVICE"] = "cpu"
    with (
        LocalFleet(environment=environment, redis="server", warn=print) as fleet,
        client_of(fleet) as client,
    ):

        def queue() -> float:
            began = time.perf_counter()
            vectors["queue"] = client.encode(texts)
            return len(texts) / (time.perf_counter() - began)

        client.encode(texts[:256])
        embedder.embed(EmbedBatch("bench", 0, texts[:256], spec))
        alones, queues, ratios = bracketed(rounds, alone, queue)
    embedder.close()
    engine.close()
    cosine = float((vectors["alone"] * vectors["queue"]).sum(axis=1).min())
    middle = statistics.median(ratios)
    speeds = (statistics.median(alones), statistics.median(queues))
    return [str(precision), *speeds, middle, min(ratios), max(ratios), cosine]


def main() -> None:
    """Run the command line."""
    parser = options("queue_tax", __doc__ or "", rounds=5)
    parser.add_argument("--texts", type=int, default=4096, help="texts per run (%(default)s)")
    parser.add_argument("--corpus", choices=CORPORA, default="docstrings", help="%(default)s")
    add_precisions(parser)
    args = parse(parser)
    texts = CORPORA[args.corpus](192 if args.quick else args.texts)
    model = find_model()
    rows, notes = by_precision(
        args.precisions, lambda precision: measure(model, precision, texts, args.rounds)
    )
    table = Table(
        f"End to end through Celery and Redis against the engine alone, {len(texts):,} texts",
        ["precision", "alone texts/s", "queue texts/s", "ratio", "lowest", "highest", "min cosine"],
        rows,
        plot="ratio",
        floor=FLOOR,
        notes=notes,
        more={"target": FLOOR},
    )
    report(args, table)


if __name__ == "__main__":
    main()
