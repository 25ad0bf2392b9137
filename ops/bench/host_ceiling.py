"""Measure the throughput of the whole pipeline with a free device, against tokenizing alone.

    ops/bench/host_ceiling.py [--texts 20480] [--quick]

The stub engine costs nothing; Celery, Redis, worker and tokenizer are real. The reference is the
library `tokenizers` in this process on all cores, which every in-process embedder needs at least.
embedq's own tokenizer, which caches words, is measured too. Texts have 64 tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import tokenizers
from common import Table, find_model, in_turn, options, parse, ratio, report, stub_client
from corpus import sized

from embedq_worker.inference.tokenizer import Tokenizer

#: Target relative to the library alone.
FLOOR = 0.75
#: Row of the reference.
LIBRARY = "tokenizers alone"
#: Number of texts per call of the tokenizer, as in a worker.
CALL_TEXTS = 512


def main() -> None:
    """Run the command line."""
    parser = options("host_ceiling", __doc__ or "", rounds=5)
    parser.add_argument("--texts", type=int, default=20_480, help="texts per round (%(default)s)")
    args = parse(parser)
    texts = sized(2_048 if args.quick else args.texts, 64)
    model = find_model()
    own_tokenizer = Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)
    library = tokenizers.Tokenizer.from_file(str(model.tokenizer_path))
    library.no_padding()
    library.enable_truncation(model.max_length)

    def alone(tokenize: Callable[[list[str]], object]) -> float:
        began = time.perf_counter()
        for at in range(0, len(texts), CALL_TEXTS):
            tokenize(texts[at : at + CALL_TEXTS])
        return len(texts) / (time.perf_counter() - began)

    def library_alone() -> float:
        return alone(lambda group: [found.ids for found in library.encode_batch_fast(group)])

    with stub_client(model.tokenizer_path) as client:

        def end_to_end() -> float:
            began = time.perf_counter()
            client.encode(texts)
            return len(texts) / (time.perf_counter() - began)

        client.encode(texts[:512])
        runs = {
            LIBRARY: library_alone,
            "embedq's tokenizer alone": lambda: alone(own_tokenizer.tokenize),
            "end to end": end_to_end,
        }
        found = in_turn(args.rounds, runs)
    rows: list[list[str | float]] = [
        [name, statistics.median(rates), ratio(rates, found[LIBRARY])]
        for name, rates in found.items()
    ]
    table = Table(
        "Texts per second with a free device, against tokenizing alone",
        ["run", "texts/s", "share of tokenizers alone"],
        rows,
        plot="share of tokenizers alone",
        floor=FLOOR,
        more={"rounds": found, "texts": len(texts), "target": FLOOR},
    )
    report(args, table)


if __name__ == "__main__":
    main()
