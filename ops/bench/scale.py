"""Whether a long job costs more than a short one: memory over a run, and the price of a text.

    ops/bench/scale.py [--texts 20000 200000 1000000] [--rate TEXTS_PER_S] [--quick]

Runs `embedq embed` over short texts through a real Redis and a worker with the stub engine, which
costs next to nothing, so that everything around the engine shows. The stub takes texts at a fixed
rate: in life too the engine is slowest, and then what is in flight is the same all the time; at
full speed (--rate 0) the figures of Redis swing with whoever happens to be ahead.

Exits with 1 if the memory of producer, worker or Redis in the last tenth of the longest run is more
than 5 % above that of its second, or the CPU time of a text more than 5 % above that of the
shortest.
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

from harness import Table, options, parsed, report

from embedq.bulk.checkpoint import manifest_path
from embedq.local.fleet import LocalFleet
from embedq.store.connection import open_redis

#: How much more the end of a long run may take than its beginning, or than a short run.
TOLERANCE = 1.05
#: Seconds between two samples of the shortest runs, and samples wanted of a long one.
SAMPLE_EVERY_S, SAMPLES = 0.02, 1_000
#: Texts a second that the stub takes, less than the queue could carry on two cores.
RATE = 8_000
PARTS = ("producer", "worker", "redis")
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at everything.

    Attributes:
        memory: bytes of each part; of Redis what it says that it uses, else resident.
        cpu_s: CPU seconds of each part since it started.
    """

    at: float
    memory: dict[str, float]
    cpu_s: dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """The figures of one run.

    Attributes:
        second_tenth_mb, last_tenth_mb, peak_mb: memory of each part.
        cpu_us_per_text: of each part.
    """

    texts: int
    docs_per_second: float
    second_tenth_mb: dict[str, float] = field(default_factory=dict)
    last_tenth_mb: dict[str, float] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    cpu_us_per_text: dict[str, float] = field(default_factory=dict)

    def growth(self) -> dict[str, float]:
        """Return the last tenth over the second."""
        return {part: self.last_tenth_mb[part] / self.second_tenth_mb[part] for part in PARTS}


class Watched:
    """The processes of a run, seen from /proc."""

    def __init__(self, results_url: str, producer: int, redis: list[int], worker: list[int]):
        self._redis = open_redis(results_url)
        self._pids = {"producer": [producer], "worker": worker, "redis": redis}

    def sample(self) -> Sample:
        """Look once."""
        memory = {part: float(sum(map(_resident, self._pids[part]))) for part in PARTS}
        info = cast(dict[str, float], self._redis.info("memory"))
        memory["redis"] = float(info["used_memory"])
        cpu = {part: sum(map(_cpu_seconds, self._pids[part])) for part in PARTS}
        return Sample(time.monotonic(), memory, cpu)

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()


def measure(fleet: LocalFleet, texts: int, folder: Path) -> Run:
    """Embed so many texts and return the figures."""
    source, output = folder / "in.txt", folder / "out.npy"
    with source.open("w", encoding="utf-8") as out:
        out.writelines(
            f"text {i:07} has some ten words and is {i % 97} short\n" for i in range(texts)
        )
    below = _descendants(os.getpid())
    redis = [pid for pid, command in below.items() if "redis-server" in command]
    worker = [pid for pid in below if pid not in redis]
    settings = {
        "EMBEDQ_BROKER_URL": fleet.broker_url,
        "EMBEDQ_RESULTS_URL": fleet.results_url,
        "EMBEDQ_MODEL": "stub",
    }
    command = [sys.executable, "-m", "embedq", "embed", source, "-o", output, "--json"]
    child = subprocess.Popen(
        [*map(str, command), "--restart"],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )
    watched = Watched(fleet.results_url, child.pid, redis, worker)
    samples: list[Sample] = []
    pause = max(SAMPLE_EVERY_S, texts / RATE / SAMPLES)
    while child.poll() is None:
        # The manifest appears when the first batch is about to be published: imports do not count.
        if manifest_path(output).exists():
            samples.append(watched.sample())
        time.sleep(pause)
    watched.close()
    answer, _ = child.communicate()
    summary = json.loads(answer)
    if child.returncode or summary["ok"] != texts:
        raise SystemExit(f"The run failed: {summary}")
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


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _descendants(pid: int) -> dict[int, str]:
    """Return the command lines of all processes below one."""
    below: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            for child in map(int, task.read_text().split()):
                below[child] = Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ")
                waiting.append(child)
    return below


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
        "Memory in the last tenth of a run against its second, stub device",
        ["run", "texts/s", "2nd tenth MB", "last MB", "growth", "peak MB", "CPU us/text"],
        rows,
        plot="growth",
        floor=TOLERANCE,
        notes=notes,
    )


def judge(short: Run, long: Run) -> list[str]:
    """Return what is not as it should be."""
    found = [
        f"memory of the {part} grew by {growth - 1:.1%} between second and last tenth"
        for part, growth in long.growth().items()
        if growth > TOLERANCE
    ]
    before, after = (sum(run.cpu_us_per_text.values()) for run in (short, long))
    if after > TOLERANCE * before:
        found.append(f"a text costs {after:.1f} us of CPU, {before:.1f} in the short run")
    return found


def main() -> None:
    """Run the command line."""
    parser = options("scale", __doc__ or "", rounds=3)
    parser.add_argument("--texts", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--rate", type=float, default=RATE, help="of the stub; 0: full speed")
    args = parsed(parser)
    lengths = [2_000, 4_000] if args.quick else sorted(args.texts)
    # The stub's product is tiny: a second thread of BLAS would only wait for it, and burn CPU.
    environment = {
        "EMBEDQ_DEVICE": "stub",
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_STUB_TEXTS_PER_S": str(args.rate),
        "OPENBLAS_NUM_THREADS": "1",
    }
    runs = []
    with (
        LocalFleet(environment=environment, redis="server", warn=print) as fleet,
        tempfile.TemporaryDirectory() as folder,
    ):
        measure(fleet, 2_000, Path(folder))  # warms the worker up
        for texts in lengths:
            repeats = args.rounds if texts == lengths[0] else 1  # of the short runs the middle one
            runs.append(_middle([measure(fleet, texts, Path(folder)) for _ in range(repeats)]))
    fine = "Memory is flat and so is the price of a text."
    found = [] if args.quick else judge(runs[0], runs[-1])
    report(args, _table(runs, found or ["Too short to judge." if args.quick else fine]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
