"""Measure the share of time in which the pipeline keeps a device of a given speed busy.

    ops/bench/feed.py [--rates 2000 4000] [--seconds 30] [--quick]

A stub simulates the speed of the device; Celery, Redis, worker and tokenizer are real. The busy
ratio is the time that the device needs for the texts, divided by the time from the first publish
to the last vector in the producer.
"""

from __future__ import annotations

import statistics
import time

from common import Table, find_model, options, parse, report, stub_client
from corpus import sized

#: Target of the busy ratio, by texts per second of the device.
FLOORS = {2000: 0.98, 4000: 0.96}
#: Approximate number of tokens of a text.
TOKENS = 64


def measure(rate: int, seconds: float, rounds: int) -> tuple[list[float], list[str]]:
    """Return the busy ratio of each round and the worker's log lines about batches."""
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
    parser.add_argument(
        "--rates", type=int, nargs="+", default=list(FLOORS), help="texts per second of the device"
    )
    parser.add_argument("--seconds", type=float, default=30, help="seconds per round")
    parser.add_argument("--verbose", action="store_true", help="print the worker's log lines")
    args = parse(parser)
    rows: list[list[str | float]] = []
    for rate in args.rates:
        ratios, lines = measure(rate, 2 if args.quick else args.seconds, args.rounds)
        middle, floor = statistics.median(ratios), FLOORS.get(rate, 0.0)
        rows.append([f"{rate:,} texts/s", middle, min(ratios), max(ratios), floor])
        if args.verbose:
            print("\n".join(lines))
    table = Table(
        "Share of time in which the device is busy, 64-token texts",
        ["device", "busy ratio", "lowest", "highest", "target"],
        rows,
        plot="busy ratio",
    )
    report(args, table)


if __name__ == "__main__":
    main()
