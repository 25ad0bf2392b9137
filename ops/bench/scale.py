"""Measure whether memory grows during a long job, and whether its texts cost more CPU time.

    ops/bench/scale.py [--texts 20000 200000 1000000] [--rate TEXTS_PER_S] [--quick]

Runs `embedq embed` over short texts with a real Redis and a worker with the stub engine. The stub
has a fixed speed, so that the number of batches in flight is constant, as with a real engine.

Exits with 1 if the memory of producer, worker or Redis in the last tenth of the longest run is more
than 5 % above that in its second tenth, or if a text of the longest run needs more than 5 % more
CPU time than one of the shortest.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from common import Table, cpu_seconds, options, parse, report, stub_environment

from embedq.bulk.checkpoint import manifest_path
from embedq.local.fleet import LocalFleet
from embedq.store.connection import open_redis

#: Maximum of the last tenth relative to the second, and of a long run relative to a short one.
TOLERANCE = 1.05
#: Minimum interval of samples, seconds.
SAMPLE_INTERVAL_S = 0.02
#: Number of samples of a long run.
SAMPLES = 1_000
#: Texts per second of the stub; below the limit of the queue on two cores.
RATE = 8_000
#: Parts of the system that are measured.
PARTS = ("producer", "worker", "redis")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory and CPU time at one moment.

    Attributes:
        at: monotonic time, seconds.
        memory: bytes by part; used_memory of Redis, resident memory of the others.
        cpu_s: CPU seconds by part since its start.
    """

    at: float
    memory: dict[str, float]
    cpu_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """Figures of one run.

    Attributes:
        second_tenth_mb, last_tenth_mb, peak_mb: memory by part.
        cpu_us_per_text: CPU time per text by part, microseconds.
    """

    texts: int
    docs_per_second: float
    second_tenth_mb: dict[str, float] = field(default_factory=dict)
    last_tenth_mb: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    cpu_us_per_text: dict[str, float] = field(default_factory=dict)

    def growth(self) -> dict[str, float]:
        """Return the memory of the last tenth relative to the second, by part."""
        return {part: self.last_tenth_mb[part] / self.second_tenth_mb[part] for part in PARTS}


class Sampler:
    """Samples the processes of a run."""

    def __init__(self, results_url: str, producer: int, redis: list[int], worker: list[int]):
        self._redis = open_redis(results_url)
        self._pids = {"producer": [producer], "worker": worker, "redis": redis}

    def sample(self) -> Sample:
        """Take one sample."""
        memory = {part: float(sum(map(_resident, self._pids[part]))) for part in PARTS}
        info = cast(dict[str, float], self._redis.info("memory"))
        memory["redis"] = float(info["used_memory"])
        cpu = {part: sum(map(cpu_seconds, self._pids[part])) for part in PARTS}
        return Sample(time.monotonic(), memory, cpu)

    def close(self) -> None:
        """Close the connection to Redis."""
        self._redis.close()


def measure(fleet: LocalFleet, texts: int, folder: Path) -> Run:
    """Embed this many texts and return the figures."""
    source, output = folder / "in.txt", folder / "out.npy"
    with source.open("w", encoding="utf-8") as out:
        out.writelines(
            f"text {i:07} has some ten words and is {i % 97} short\n" for i in range(texts)
        )
    processes = _descendants(os.getpid())
    redis = [pid for pid, command in processes.items() if "redis-server" in command]
    worker = [pid for pid in processes if pid not in redis]
    settings = {
        "EMBEDQ_BROKER_URL": fleet.broker_url,
        "EMBEDQ_RESULTS_URL": fleet.results_url,
        "EMBEDQ_MODEL": "stub",
    }
    command = [sys.executable, "-m", "embedq", "embed", source, "-o", output, "--json"]
    process = subprocess.Popen(
        [*map(str, command), "--restart"],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )
    sampler = Sampler(fleet.results_url, process.pid, redis, worker)
    samples: list[Sample] = []
    interval_s = max(SAMPLE_INTERVAL_S, texts / RATE / SAMPLES)
    while process.poll() is None:
        # The manifest is written before the first batch is published, so imports are not counted.
        if manifest_path(output).exists():
            samples.append(sampler.sample())
        time.sleep(interval_s)
    sampler.close()
    answer, _ = process.communicate()
    summary = json.loads(answer)
    if process.returncode or summary["ok"] != texts:
        raise SystemExit(f"The run ended with status {process.returncode}: {summary}")
    for path in folder.iterdir():
        path.unlink()
    return _figures(texts, [sample for sample in samples if sample.memory["producer"]], summary)


def _figures(texts: int, samples: list[Sample], summary: dict[str, float]) -> Run:
    first, last = samples[0], samples[-1]
    span = last.at - first.at

    def tenth(number: int) -> dict[str, float]:
        begin = first.at + span * (number - 1) / 10
        here = [s for s in samples if begin <= s.at <= begin + span / 10]
        return _each(lambda part: statistics.mean(s.memory[part] for s in here) / 1e6)

    return Run(
        texts=texts,
        docs_per_second=summary["docs_per_second"],
        second_tenth_mb=tenth(2),
        last_tenth_mb=tenth(10),
        peak_mb=_each(lambda part: max(s.memory[part] for s in samples) / 1e6),
        cpu_us_per_text=_each(lambda part: 1e6 * (last.cpu_s[part] - first.cpu_s[part]) / texts),
    )


def _each(figure: Callable[[str], float]) -> dict[str, float]:
    return {part: round(figure(part), 2) for part in PARTS}


def _middle(runs: list[Run]) -> Run:
    return sorted(runs, key=lambda run: sum(run.cpu_us_per_text.values()))[len(runs) // 2]


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


def _descendants(pid: int) -> dict[int, str]:
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                found[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                waiting.append(child)
    return found


def _table(runs: list[Run], notes: list[str]) -> Table:
    rows: list[list[str | float]] = [
        [
            f"{run.texts:,} texts, {part}",
            run.docs_per_second,
            run.second_tenth_mb[part],
            run.last_tenth_mb[part],
            run.growth()[part],
            run.peak_mb[part],
            run.cpu_us_per_text[part],
        ]
        for run in runs
        for part in PARTS
    ]
    return Table(
        "Memory in the last tenth of a run, relative to its second tenth, stub device",
        ["run", "texts/s", "2nd tenth MB", "last MB", "growth", "peak MB", "CPU us/text"],
        rows,
        plot="growth",
        floor=TOLERANCE,
        notes=notes,
    )


def find_growth(short: Run, long: Run) -> list[str]:
    """Return a sentence for each figure above the tolerance."""
    found = [
        f"memory of the {part} grew by {growth - 1:.1%} between second and last tenth"
        for part, growth in long.growth().items()
        if growth > TOLERANCE
    ]
    before, after = (sum(run.cpu_us_per_text.values()) for run in (short, long))
    if after > TOLERANCE * before:
        found.append(f"a text needs {after:.1f} us of CPU time, {before:.1f} us in the short run")
    return found


def main() -> None:
    """Run the command line."""
    parser = options("scale", __doc__ or "", rounds=3)
    parser.add_argument(
        "--texts", type=int, nargs="+", default=[20_000, 200_000], help="texts of each run"
    )
    parser.add_argument("--rate", type=float, default=RATE, help="texts/s of the stub, 0: no limit")
    args = parse(parser)
    lengths = [2_000, 4_000] if args.quick else sorted(args.texts)
    environment = stub_environment(args.rate)
    runs = []
    with (
        LocalFleet(environment=environment, redis="server", warn=print) as fleet,
        tempfile.TemporaryDirectory() as folder,
    ):
        measure(fleet, 2_000, Path(folder))  # warms the worker up
        for texts in lengths:
            repeats = args.rounds if texts == lengths[0] else 1  # short runs vary more
            runs.append(_middle([measure(fleet, texts, Path(folder)) for _ in range(repeats)]))
    found = [] if args.quick else find_growth(runs[0], runs[-1])
    note = "Neither memory nor CPU time per text grows."
    if args.quick:
        note = "These runs are too short to compare."
    report(args, _table(runs, found or [note]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
