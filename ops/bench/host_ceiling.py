"""How many texts a second pass through everything but a device, against tokenizing alone.

    ops/bench/host_ceiling.py [--texts 20480] [--quick]

A stub that costs nothing behind Celery and Redis, fed by the real tokenizer, against the library
`tokenizers` called alone in this process with all cores, which is what every in-process embedder
spends at least. Our own tokenizer alone, which remembers words, is shown beside it. 64-token texts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import tokenizers
from corpus import sized
from harness import Table, find_model, in_turn, options, parsed, ratio, report, stub_client

from embedq_worker.inference.tokenizer import Tokenizer

#: Of the library alone.
FLOOR = 0.75
LIBRARY = "tokenizers alone"
#: Texts of one call of the tokenizer, as workers do it.
CALL_TEXTS = 512


def main() -> None:
    """Run the command line."""
    parser = options("host_ceiling", __doc__ or "", rounds=5)
    parser.add_argument("--texts", type=int, default=20_480, help="a round (%(default)s)")
    args = parsed(parser)
    texts = sized(2_048 if args.quick else args.texts, 64)
    model = find_model()
    ours = Tokenizer(model.tokenizer_path, model.max_length)
    library = tokenizers.Tokenizer.from_file(str(model.tokenizer_path))
    library.no_padding()
    library.enable_truncation(model.max_length)

    def alone(tokenize: Callable[[list[str]], object]) -> float:
        began = time.perf_counter()
        for at in range(0, len(texts), CALL_TEXTS):
            tokenize(texts[at : at + CALL_TEXTS])
        return len(texts) / (time.perf_counter() - began)

    def with_library() -> float:
        return alone(lambda group: [found.ids for found in library.encode_batch_fast(group)])

    with stub_client(model.tokenizer_path) as client:

        def through_everything() -> float:
            began = time.perf_counter()
            client.encode(texts)
            return len(texts) / (time.perf_counter() - began)

        client.encode(texts[:512])
        ways = {
            LIBRARY: with_library,
            "ours alone": lambda: alone(ours.tokenize),
            "end to end": through_everything,
        }
        found = in_turn(args.rounds, ways)
    rows: list[list[str | float]] = [
        [name, statistics.median(rates), ratio(rates, found[LIBRARY])]
        for name, rates in found.items()
    ]
    table = Table(
        "Texts a second with a device that costs nothing, against tokenizing alone",
        ["what", "texts/s", "of tokenizers alone"],
        rows,
        plot="of tokenizers alone",
        floor=FLOOR,
        more={"rounds": found, "texts": len(texts), "to_reach": FLOOR},
    )
    report(args, table)


if __name__ == "__main__":
    main()
