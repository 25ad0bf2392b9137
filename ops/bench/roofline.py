"""Measure GFLOP/s of the engine against the largest matrix product of the cores.

    ops/bench/roofline.py [--texts 1024] [--precisions f32 bf16] [--quick]

The engine infers prepared token batches, with `concurrency` callers. Only matrix products of real
tokens count; padding, embeddings, norms and GELU do not. The reference is the fastest of several
matrix products in the same runtime and precision; both take turns in one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openvino
from common import (
    Table,
    add_precisions,
    by_precision,
    find_model,
    in_turn,
    options,
    parse,
    ratio,
    report,
)
from corpus import CORPORA

from embedq.protocol.contract import Precision
from embedq_worker.engines.base import Engine, TokenBatch
from embedq_worker.engines.factory import open_engine
from embedq_worker.inference.embedder import build_groups
from embedq_worker.inference.selection import DEFAULT_TOKEN_BUDGET
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.resolve import Model
from embedq_worker.settings import available_cores

#: Target of the ratio.
FLOOR = 0.75
#: Rows, inner size and columns of the products: two of the model, and larger ones.
SHAPES = ((512, 384, 1536), (512, 1536, 384), (1024, 1024, 1024), (2048, 2048, 2048))
#: Duration of each shape per round, seconds.
SHAPE_S = 0.5


def flops_of(lengths: np.ndarray, config: Mapping[str, Any]) -> float:
    """Count the floating-point operations of the matrix products for texts of these lengths."""
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    linear = 2 * layers * (4 * width * width + 2 * width * config["intermediate_size"])
    attention = 4 * layers * width
    return float((lengths * (linear + attention * lengths)).sum())


def product(shape: Sequence[int], precision: Precision, cores: int) -> Callable[[], float]:
    """Return a function that measures GFLOP/s of one product, with one caller per core."""
    rows, inner, columns = shape
    ops: Any = openvino.opset13
    left = ops.parameter([rows, inner], np.float32)
    right = ops.constant(np.random.default_rng(0).standard_normal((inner, columns), np.float32))
    model = openvino.Model([ops.matmul(left, right, False, False)], [left], "product")
    properties = {
        "INFERENCE_PRECISION_HINT": str(precision),
        "NUM_STREAMS": str(cores),
        "INFERENCE_NUM_THREADS": str(cores),
        "ENABLE_CPU_PINNING": "NO",
    }
    compiled = openvino.Core().compile_model(model, "CPU", properties)
    requests = [compiled.create_infer_request() for _ in range(cores)]
    values = np.random.default_rng(1).standard_normal((rows, inner), np.float32)
    for request in requests:
        request.infer([values])

    def until(request: Any, end: float) -> int:
        runs = 0
        while time.perf_counter() < end:
            request.infer()
            runs += 1
        return runs

    def measure() -> float:
        with ThreadPoolExecutor(cores) as callers:
            began = time.perf_counter()
            runs = sum(callers.map(lambda each: until(each, began + SHAPE_S), requests))
            return 2e-9 * runs * rows * inner * columns / (time.perf_counter() - began)

    return measure


def engine_alone(engine: Engine, batches: Sequence[TokenBatch], flops: float) -> float:
    """Infer all token batches and return GFLOP/s."""
    with ThreadPoolExecutor(engine.concurrency) as callers:
        began = time.perf_counter()
        list(callers.map(engine.infer, batches))
        return 1e-9 * flops / (time.perf_counter() - began)


def measure(model: Model, precision: Precision, texts: list[str], rounds: int) -> list[str | float]:
    """Return the table row of a precision."""
    cores = available_cores()
    engine = open_engine("openvino", model, cores, precision)
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)
    tokens = tokenizer.tokenize(texts)
    everything = np.arange(len(tokens))
    budget, streams = DEFAULT_TOKEN_BUDGET, engine.concurrency
    batches = list(
        build_groups(tokens, everything, tokenizer.pad_id, engine.row_spec, budget, streams)
    )
    flops = flops_of(tokens.lengths, model.architecture)
    products = [product(shape, precision, cores) for shape in SHAPES]
    engine_alone(engine, batches, flops)  # the first inferences allocate memory
    found = in_turn(
        rounds,
        {
            "engine": lambda: engine_alone(engine, batches, flops),
            "product": lambda: max(each() for each in products),
        },
    )
    engine.close()
    share = ratio(found["engine"], found["product"])
    medians = (statistics.median(found["engine"]), statistics.median(found["product"]))
    return [str(precision), *medians, share, len(texts) * medians[0] * 1e9 / flops]


def main() -> None:
    """Run the command line."""
    parser = options("roofline", __doc__ or "", rounds=5)
    parser.add_argument("--texts", type=int, default=1024, help="texts per run (%(default)s)")
    parser.add_argument("--corpus", choices=CORPORA, default="docstrings", help="%(default)s")
    add_precisions(parser)
    args = parse(parser)
    texts = CORPORA[args.corpus](64 if args.quick else args.texts)
    model = find_model()
    rows, notes = by_precision(
        args.precisions, lambda precision: measure(model, precision, texts, args.rounds)
    )
    table = Table(
        "Engine alone against the largest matrix product of the same precision",
        ["precision", "engine GFLOP/s", "product GFLOP/s", "ratio", "texts/s"],
        rows,
        plot="ratio",
        floor=FLOOR,
        notes=notes,
        more={"target": FLOOR, "texts": len(texts)},
    )
    report(args, table)


if __name__ == "__main__":
    main()
