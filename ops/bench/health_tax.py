"""What does a healthy fleet pay for being watched? The same stub NPU with and without its shadow.

    ops/bench/health_tax.py [--rate 2000] [--seconds 20] [--quick]

Both workers play an NPU of a given speed behind Celery and Redis, with real tokens. One has every
default of a production worker: heartbeat, guard, operator's orders, shadow check. The other beats
as seldom as it may and has no shadow. Guard and orders cannot be switched off; what they cost is in
the CPU time of the worker's idle parent, which is measured beside.
"""

from __future__ import annotations

import os
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

from corpus import sized
from harness import Table, client_of, find_model, in_turn, options, parsed, ratio, report

from embedq import Client
from embedq.local.fleet import LocalFleet
from embedq.store import fleet

#: Tokens of a text, about.
TOKENS = 64
#: Least share of the unwatched throughput.
FLOOR = 0.99
#: Seconds over which the CPU time of an idle parent is measured.
IDLE_S = 20.0

WATCHED = {"EMBEDQ_SHADOW_CHECK_EVERY": "64"}
UNWATCHED = {"EMBEDQ_SHADOW_CHECK_EVERY": "0", "EMBEDQ_HEARTBEAT_S": "10"}


def open_worker(stack: ExitStack, rate: int, settings: dict[str, str]) -> Client:
    """Start a worker that plays an NPU, and return a client of it."""
    environment = {
        "EMBEDQ_DEVICE": "stub",
        "EMBEDQ_STUB_DEVICE": "npu",
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_STUB_TEXTS_PER_S": str(rate),
        "EMBEDQ_STUB_TOKENIZER": str(find_model().tokenizer_path),
        "OPENBLAS_NUM_THREADS": "1",
        **settings,
    }
    local = stack.enter_context(LocalFleet(environment=environment, redis="server", warn=print))
    return stack.enter_context(client_of(local, model="stub"))


def cpu_s(pid: int) -> float:
    """Return the CPU time that a process has used, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def idle_share(client: Client, seconds: float) -> float:
    """Return the share of one core that a worker's parent uses with nothing to do."""
    [worker] = fleet.list_live_workers(client.redis)
    before = cpu_s(worker.pid)
    time.sleep(seconds)
    return (cpu_s(worker.pid) - before) / seconds


def main() -> None:
    """Run the command line."""
    parser = options("health_tax", __doc__ or "", rounds=3)
    parser.add_argument("--rate", type=int, default=2000, help="texts a second of the device")
    parser.add_argument("--seconds", type=float, default=20, help="of the device, a round")
    args = parsed(parser)
    texts = sized(int(args.rate * (2 if args.quick else args.seconds)), TOKENS)

    def embed(client: Client) -> float:
        began = time.perf_counter()
        client.encode(texts)
        return len(texts) / (time.perf_counter() - began)

    with ExitStack() as stack:
        watched = open_worker(stack, args.rate, WATCHED)
        bare = open_worker(stack, args.rate, UNWATCHED)
        for client in (watched, bare):
            client.encode(texts[:512])
        runs = {"watched": lambda: embed(watched), "bare": lambda: embed(bare)}
        found = in_turn(args.rounds, runs)
        idle = idle_share(watched, 2.0 if args.quick else IDLE_S)
    share = ratio(found["watched"], found["bare"])
    rows: list[list[str | float]] = [
        ["watched", statistics.median(found["watched"]), share, FLOOR],
        ["unwatched", statistics.median(found["bare"]), 1.0, FLOOR],
    ]
    table = Table(
        "What a healthy fleet pays for being watched",
        ["worker", "texts/s", "share", "to reach"],
        rows,
        plot="share",
        floor=FLOOR,
        notes=[f"An idle parent uses {idle:.2%} of one core, Celery included."],
        more={"rounds": found, "idle_parent_core_share": idle},
    )
    report(args, table)
    raise SystemExit(share < FLOOR)


if __name__ == "__main__":
    main()
