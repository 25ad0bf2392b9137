"""From `embedq-worker start` to the first vector on the CPU, split into phases.

    ops/bench/start.py [--rounds 5] [--json FILE]

One round warms the caches and does not count; the median of the others does. Exits 1 when the
median to serving is above the target. The model is the one that the settings name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from embedq import Client
from embedq.redis_server import RedisServer, choose
from embedq.rundir import RunFolder
from embedq.settings import ProducerSettings
from embedq.tethered import Tethered

#: Seconds from the command to serving, on two cores with a warm cache.
TARGET_S: Final = 4.0
DEADLINE_S: Final = 60.0
LOOK_EVERY_S: Final = 0.002
#: Phase -> words of the line of the node's log that ends it; each begins where the last ended.
PHASES: Final = {
    "supervisor, Python, settings": "device_chosen",
    "Celery's parent": " ready.",
    "model, engine, self-test": "serving node=",
    "queues": "Started consuming from embed.npu",
}
#: The phase behind the log: a text through the queue and back.
FIRST_VECTOR: Final = "first vector, client and all"


def measure(rounds: int) -> dict[str, object]:
    """Start a node again and again, and return the figures."""
    folder = RunFolder.create()
    server = choose("auto", folder.path)
    redis = Tethered(server.command, folder.path / "redis.log", grace_s=0)
    try:
        _wait(server.answers, "Redis")
        one_round(server)
        found = [one_round(server) for _ in range(rounds)]
    finally:
        redis.end()
        folder.remove()
    medians = {name: statistics.median(each[name] for each in found) for name in found[0]}
    serving_s = statistics.median(sum(each[name] for name in PHASES) for each in found)
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}",
        "command": " ".join(["ops/bench/start.py", *sys.argv[1:]]),
        "rounds": rounds,
        "phases_s": {name: round(seconds, 3) for name, seconds in medians.items()},
        "to_serving_s": round(serving_s, 3),
        "target_s": TARGET_S,
        "share_of_target": round(serving_s / TARGET_S, 2),
        "supervisor": supervisor(),
    }


def one_round(server: RedisServer) -> dict[str, float]:
    """Start a node once; return the seconds of each phase."""
    folder = server.socket_path.parent
    log_path = folder / "node.log"
    environment = {
        **os.environ,
        "EMBEDQ_BROKER_URL": server.broker_url,
        "EMBEDQ_RESULTS_URL": server.results_url,
        "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "node"),
        "EMBEDQ_DEVICE": "cpu",
    }
    phases: dict[str, float] = {}
    with log_path.open("wb") as log:
        mark = time.monotonic()
        node = subprocess.Popen(
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
        node.terminate()
        node.wait()
    return phases


def supervisor() -> dict[str, float]:
    """Return what supervision adds to a bare Python: its imports, and its size while it runs."""
    # Not getrusage: a child begins with the peak of the process that forked it.
    script = "{}; print(open('/proc/self/status').read().split('VmRSS:')[1].split()[0])"
    bare, bare_kb = _python(script.format("pass"))
    with_it, kb = _python(script.format("import embedq_worker.__main__, embedq_worker.supervisor"))
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
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="starts that count (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    figures = measure(args.rounds)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['date']}, {figures['machine']}: {figures['command']}")
    phases = figures["phases_s"]
    assert isinstance(phases, dict)
    for name, seconds in phases.items():
        print(f"{name:32}{seconds:7.2f} s")
    print(f"{'to serving':32}{figures['to_serving_s']:7} s of {TARGET_S:.0f} s")
    print(f"supervisor: {figures['supervisor']}")
    to_serving = figures["to_serving_s"]
    assert isinstance(to_serving, float)
    sys.exit(to_serving > TARGET_S)


if __name__ == "__main__":
    main()
