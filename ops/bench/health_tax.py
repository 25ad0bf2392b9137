"""Measure the throughput cost of shadow checks and heartbeats on a worker with a simulated NPU.

    ops/bench/health_tax.py [--rate 2000] [--seconds 20] [--quick]

Two workers with a stub NPU of the same speed take turns. One has the default settings; the other
has no shadow checks and the longest heartbeat interval. Device health and operator commands cannot
be switched off; the CPU time of the idle main process shows their cost.
"""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack

from common import (
    Table,
    cpu_seconds,
    find_model,
    in_turn,
    options,
    parse,
    ratio,
    report,
    stub_client,
)
from corpus import sized

from embedq import Client
from embedq.store import fleet

#: Approximate number of tokens of a text.
TOKENS = 64
#: Target of the throughput relative to the worker without checks.
FLOOR = 0.99
#: Duration of the measurement of the idle main process, seconds.
IDLE_S = 20.0

#: Settings of the worker with the default checks.
CHECKED = {"EMBEDQ_STUB_DEVICE": "npu", "EMBEDQ_SHADOW_CHECK_EVERY": "64"}
#: Settings of the worker with as few checks as possible.
UNCHECKED = {**CHECKED, "EMBEDQ_SHADOW_CHECK_EVERY": "0", "EMBEDQ_HEARTBEAT_S": "10"}


def idle_share(client: Client, seconds: float) -> float:
    """Return the share of one core that an idle main process uses."""
    [worker] = fleet.list_live_workers(client.redis)
    before = cpu_seconds(worker.pid)
    time.sleep(seconds)
    return (cpu_seconds(worker.pid) - before) / seconds


def main() -> None:
    """Run the command line."""
    parser = options("health_tax", __doc__ or "", rounds=3)
    parser.add_argument("--rate", type=int, default=2000, help="texts per second of the device")
    parser.add_argument("--seconds", type=float, default=20, help="seconds per round")
    args = parse(parser)
    texts = sized(int(args.rate * (2 if args.quick else args.seconds)), TOKENS)
    tokenizer = find_model().tokenizer_path

    def embed(client: Client) -> float:
        began = time.perf_counter()
        client.encode(texts)
        return len(texts) / (time.perf_counter() - began)

    with ExitStack() as stack:
        checked, unchecked = (
            stack.enter_context(stub_client(tokenizer, args.rate, settings=settings))
            for settings in (CHECKED, UNCHECKED)
        )
        for client in (checked, unchecked):
            client.encode(texts[:512])
        runs = {"checked": lambda: embed(checked), "unchecked": lambda: embed(unchecked)}
        found = in_turn(args.rounds, runs)
        idle = idle_share(checked, 2.0 if args.quick else IDLE_S)
    share = ratio(found["checked"], found["unchecked"])
    rows: list[list[str | float]] = [
        ["checked", statistics.median(found["checked"]), share, FLOOR],
        ["unchecked", statistics.median(found["unchecked"]), 1.0, FLOOR],
    ]
    table = Table(
        "Throughput with shadow checks and heartbeats, relative to almost none",
        ["worker", "texts/s", "share", "target"],
        rows,
        plot="share",
        floor=FLOOR,
        notes=[f"An idle main process uses {idle:.2%} of one core, Celery included."],
        more={"rounds": found, "idle_main_process_core_share": idle},
    )
    report(args, table)
    raise SystemExit(share < FLOOR)


if __name__ == "__main__":
    main()
