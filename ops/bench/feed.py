"""Is a fast device kept busy? A stub of a given speed behind Celery and Redis, real tokens.

    ops/bench/feed.py [--rates 2000 4000] [--seconds 30] [--quick]

The stub takes as long as a device of that many texts a second would, and is fed by the real
tokenizer through a real worker: one child, one task at a time. The busy ratio is what the device
needed at least over what passed between the first send and the last vector in the producer, start
and end included.
"""

from __future__ import annotations

import statistics
import time

from corpus import sized
from harness import Table, find_model, options, parsed, report, stub_client

#: Busy ratio that a device of this speed must reach.
FLOORS = {2000: 0.98, 4000: 0.96}
#: Tokens of a text, about.
TOKENS = 64


def measure(rate: int, seconds: float, rounds: int) -> tuple[list[float], list[str]]:
    """Return the busy ratio of each round, and the worker's own figures for its batches."""
    texts = sized(int(rate * seconds), TOKENS)
    ratios, log = [], list[str]()
    with stub_client(find_model().tokenizer_path, rate, log) as client:
        client.encode(texts[:512])
        for _ in range(rounds):
            began = time.perf_counter()
            client.encode(texts)
            ratios.append(len(texts) / rate / (time.perf_counter() - began))
    return ratios, [line for line in log if "batch_done" in line]


def main() -> None:
    """Run the command line."""
    parser = options("feed", __doc__ or "", rounds=3)
    parser.add_argument("--rates", type=int, nargs="+", default=list(FLOORS), help="texts a second")
    parser.add_argument("--seconds", type=float, default=30, help="of the device, a round")
    parser.add_argument("--verbose", action="store_true", help="the worker's lines as well")
    args = parsed(parser)
    rows: list[list[str | float]] = []
    for rate in args.rates:
        ratios, lines = measure(rate, 2 if args.quick else args.seconds, args.rounds)
        middle, floor = statistics.median(ratios), FLOORS.get(rate, 0.0)
        rows.append([f"{rate:,} texts/s", middle, min(ratios), max(ratios), floor])
        if args.verbose:
            print("\n".join(lines))
    table = Table(
        "How busy a device is kept, 64-token texts, first send to last vector",
        ["device", "busy ratio", "lowest", "highest", "to reach"],
        rows,
        plot="busy ratio",
    )
    report(args, table)


if __name__ == "__main__":
    main()
