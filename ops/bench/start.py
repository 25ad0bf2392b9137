"""From `embedq-worker start` to the first vector on the CPU, split into phases.

    ops/bench/start.py [--rounds 5] [--quick]

One round warms the caches and does not count; the median of the others does. Exits 1 when the
median to serving is above the target. The model is the one that the settings name.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from harness import Table, find_model, options, parsed, report

from embedq import Client
from embedq.local.fleet import ManagedProcess, RuntimeDir
from embedq.local.redis_server import RedisServer, choose
from embedq.settings import ProducerSettings

#: Seconds from the command to serving, on two cores with a warm cache.
TARGET_S: Final = 4.0
DEADLINE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.002
#: Phase -> words of the line of the worker's log that ends it; each begins where the last ended.
PHASES: Final = {
    "supervisor, Python, settings": "device_chosen",
    "Celery's parent": " ready.",
    "model, engine, self-test": "serving worker=",
    "queues": "Started consuming from embed.npu",
}
#: The phase behind the log: a text through the queue and back.
FIRST_VECTOR: Final = "first vector, client and all"


def measure(rounds: int) -> tuple[Table, float]:
    """Start a worker again and again; return the figures, and the median seconds to serving."""
    folder = RuntimeDir.create()
    server = choose("auto", folder.path)
    redis = ManagedProcess(server.command, folder.path / "redis.log", grace_s=0)
    try:
        _wait(server.answers, "Redis")
        one_round(server)
        found = [one_round(server) for _ in range(rounds)]
    finally:
        redis.end()
        folder.remove()
    rows: list[list[str | float]] = [
        [name, statistics.median(each[name] for each in found)] for name in found[0]
    ]
    serving_s = statistics.median(sum(each[name] for name in PHASES) for each in found)
    rows.append(["to serving", serving_s])
    added = supervisor()
    table = Table(
        "From `embedq-worker start` to serving on the CPU, warm cache",
        ["phase", "seconds"],
        rows,
        plot="seconds",
        floor=TARGET_S,
        notes=[
            f"The supervisor adds {added['import_ms']:.0f} ms of imports to a bare Python, and is "
            f"{added['memory_mb']:.1f} MB where that is {added['bare_python_mb']:.1f} MB."
        ],
        more={"to_reach_s": TARGET_S, "supervisor": added},
    )
    return table, serving_s


def one_round(server: RedisServer) -> dict[str, float]:
    """Start a worker once; return the seconds of each phase."""
    folder = server.socket_path.parent
    log_path = folder / "worker.log"
    environment = {
        **os.environ,
        "EMBEDQ_BROKER_URL": server.broker_url,
        "EMBEDQ_RESULTS_URL": server.results_url,
        "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "worker"),
        "EMBEDQ_DEVICE": "cpu",
    }
    phases: dict[str, float] = {}
    with log_path.open("wb") as log:
        mark = time.monotonic()
        worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "embedq_worker", "start"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        for name, words in PHASES.items():
            _wait(lambda words=words: words in log_path.read_text(), name)  # type: ignore[misc] # bound
            phases[name], mark = time.monotonic() - mark, time.monotonic()
        settings = ProducerSettings.load(
            broker_url=server.broker_url, results_url=server.results_url
        )
        with Client(settings=settings) as client:
            client.encode("one text")
        phases[FIRST_VECTOR] = time.monotonic() - mark
    finally:
        worker.terminate()
        worker.wait()
    return phases


def supervisor() -> dict[str, float]:
    """Return what supervision adds to a bare Python: its imports, and its size while it runs."""
    # Not getrusage: a child begins with the peak of the process that forked it.
    script = "{}; print(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    bare, bare_kb = _python(script.format("pass"))
    with_it, kb = _python(
        script.format("import embedq_worker.__main__, embedq_worker.main_process.supervisor")
    )
    return {
        "import_ms": round(1e3 * (with_it - bare), 1),
        "memory_mb": round(kb / 1e3, 1),
        "bare_python_mb": round(bare_kb / 1e3, 1),
    }


def _python(script: str) -> tuple[float, float]:
    times, answer = [], ""
    for _ in range(7):
        began = time.monotonic()
        command = [sys.executable, "-P", "-c", script]
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        times.append(time.monotonic() - began)
    return min(times), float(answer)


def _wait(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not look():
        if time.monotonic() > deadline:
            raise SystemExit(f"Waited {DEADLINE_S:.0f} s for {what}.")
        time.sleep(LOOK_EVERY_S)


def main() -> None:
    """Run the command line."""
    args = parsed(options("start", __doc__ or "", rounds=5))
    find_model()  # a worker that has none only says so in its log
    table, serving_s = measure(args.rounds)
    report(args, table)
    sys.exit(serving_s > TARGET_S)


if __name__ == "__main__":
    main()
