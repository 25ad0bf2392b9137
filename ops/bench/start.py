"""Measure the phases from `embedq-worker start` to the first vector on the CPU.

    ops/bench/start.py [--rounds 5] [--quick]

A first round fills the caches and is not counted. Exits with 1 if the median time to serving is
above the target. The model is that of the settings.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Final

from common import Table, find_model, options, parse, report

from embedq import Client
from embedq.local.fleet import ManagedProcess, RuntimeDir
from embedq.local.redis_server import RedisServer, choose
from embedq.settings import ProducerSettings

#: Target of the time to serving on two cores with a warm cache, seconds.
TARGET_S: Final = 4.0
#: Timeout of each phase, seconds.
TIMEOUT_S: Final = 60.0
#: Interval of polling the log, seconds.
POLL_INTERVAL_S: Final = 0.002
#: Text in the worker's log that ends each phase, in order of the phases.
PHASES: Final = {
    "supervisor, Python, settings": "device_chosen",
    "Celery's main process": " ready.",
    "model, engine, self-test": "serving worker=",
    "queues": "Started consuming from embed.npu",
}
#: Phase after those of the log: one text through the queue and back.
FIRST_VECTOR: Final = "first vector, client included"


def measure(rounds: int) -> tuple[Table, float]:
    """Start a worker repeatedly; return the figures and the median seconds to serving."""
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
            f"Compared with an empty Python, the supervisor needs {added['import_ms']:.0f} ms more "
            f"to start, and {added['memory_mb']:.1f} MB instead of {added['bare_python_mb']:.1f}."
        ],
        more={"target_s": TARGET_S, "supervisor": added},
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
            _wait(lambda words=words: words in log_path.read_text(), name)  # type: ignore[misc] # the default binds the loop variable
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
    """Measure start time and memory of the supervisor's process, compared with an empty Python."""
    # Not getrusage: its peak includes that of the process before the fork.
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


def _wait(poll: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not poll():
        if time.monotonic() > deadline:
            raise SystemExit(f"Waited {TIMEOUT_S:.0f} s for {what}.")
        time.sleep(POLL_INTERVAL_S)


def main() -> None:
    """Run the command line."""
    args = parse(options("start", __doc__ or "", rounds=5))
    find_model()  # exits here if there is no model; a worker would only log it
    table, serving_s = measure(args.rounds)
    report(args, table)
    sys.exit(serving_s > TARGET_S)


if __name__ == "__main__":
    main()
