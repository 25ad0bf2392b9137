#!/usr/bin/env python3
"""Let scripted faults strike two emulated NPUs while a job runs, and check every vector of it.

    ops/chaos/device_faults.py [--faults N] [--seed S] [--report DIR]

Two workers with a stub that plays an NPU and one on the CPU serve a job of 16-text batches. Each
NPU is struck by one fault after the other, and must degrade, hand on what it holds, and come back.
Now and then Redis is killed or drops its clients while a worker is degraded. In the end all NPUs
die: the CPU must drain the job, and one that returns must serve again after one probe.

Exits with 1 if a text is lost, wrong or there twice, or a bound is not held.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NoReturn

ROOT: Final = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "producer"), str(ROOT / "worker")]

from ops.chaos.device_fleet import SETTINGS, CpuWorker, Npu, Stage  # noqa: E402 # the path comes first
from ops.chaos.device_job import Job  # noqa: E402 # as above
from ops.chaos.report import machine  # noqa: E402 # as above

#: Kind of fault -> line of the script that brings it about.
FAULTS: Final = {
    "raise": "infer=raise",
    "device lost": "infer=device_lost",
    "unknown": "infer=device_unknown",
    "out of memory": "infer=out_of_memory",
    "hang": "infer=hang",
    "not a number": "infer=nan",
    "wrong vectors": "infer=wrong",
    "slow": "infer=slow seconds=1",
    "init raise": "init=raise",
    "init exit": "init=exit",
    "init segfault": "init=segfault",
    "init slow": "init=slow seconds=60",
    "compile hang": "init=hang",
}
#: Faults between two that strike Redis as well.
REDIS_EVERY: Final = 25
#: Seconds that a degraded worker is watched after that.
SHAKEN_S: Final = 2.0
#: Seconds that any one step may take before the run is given up.
STEP_S: Final = 60.0
#: Bounds, in seconds: fault seen -> batch in the CPU queue (p99), degraded -> out of the NPU queue.
REROUTE_S, LEAVE_S = 2.0, 0.5

#: What is done to one NPU, step by step; yields True whenever it waits.
Story = Iterator[bool]


class Run:
    """One run and what came of it."""

    def __init__(self, options: argparse.Namespace, stage: Stage) -> None:
        self.options = options
        self.stage = stage
        self.rng = random.Random(options.seed)
        self.struck: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self.redis_struck = {"kill -9 of Redis": 0, "CLIENT KILL": 0}
        self.breaches: list[str] = []
        self.backlog: dict[str, Any] = {}

    def strike(self, job: Job) -> None:
        """Strike both NPUs, each at its own pace, until enough faults have struck."""
        stories = [self._story(npu) for npu in self.stage.npus]
        while stories and not job.error:
            stories = [story for story in stories if next(story, False)]
            self.stage.tend()
            time.sleep(0.02)

    def _story(self, npu: Npu) -> Story:
        """Strike one NPU again and again; yields whenever it waits."""
        while sum(self.struck.values()) < self.options.faults:
            kind = min(FAULTS, key=lambda kind: (self.struck[kind], self.rng.random()))
            self.struck[kind] += 1
            number = sum(self.struck.values())
            if kind == "slow":
                yield from self._wait(npu.knows_its_pace, f"{npu.name} to know its pace")
            npu.strike(FAULTS[kind])
            yield from self._wait(lambda: npu.is_away(), f"{npu.name} to degrade after {kind}")
            if number % REDIS_EVERY == 0:
                yield from self._strike_redis(npu)
            npu.mend()
            yield from self._wait(lambda: npu.is_back(), f"{npu.name} to return after {kind}")

    def _strike_redis(self, npu: Npu) -> Story:
        """Shake the broker while a worker is degraded: it must stay out of the NPU queue."""
        kind = self.rng.choice(list(self.redis_struck))
        self.redis_struck[kind] += 1
        before = npu.count("received")
        if kind == "CLIENT KILL":
            self.stage.kill_clients()
        else:
            self.stage.restart_broker()
        until = time.monotonic() + SHAKEN_S
        while time.monotonic() < until:
            yield True
        if npu.count("received") > before:
            self.breaches.append(f"{npu.name} took a batch while degraded, after {kind}")

    def all_die(self, job: Job) -> None:
        """Kill all NPUs, let the CPU drain what waits, and let one return."""
        for npu in self.stage.npus:
            npu.strike("infer=device_lost")
        self._until(lambda: all(npu.is_away() for npu in self.stage.npus), "all NPUs to die")
        before, began = job.done, time.monotonic()
        self._until(lambda: job.done >= before + 512 or bool(job.error), "the CPU to go on alone")
        alone_s = time.monotonic() - began
        one = self.stage.npus[0]
        served, passed = one.count("batch_done"), one.count("probe_passed")
        one.mend()
        self._until(one.is_back, "one NPU to return")
        self._until(lambda: one.count("batch_done") > served, "vectors of an NPU again")
        self.backlog = {
            "texts drained by the CPU alone": job.done - before,
            "seconds for the first 512": round(alone_s, 1),
            "passed probes until the NPU served again": one.count("probe_passed") - passed,
        }

    def _wait(self, is_so: Callable[[], bool], what: str) -> Story:
        step_s = STEP_S * self.options.patience
        until = time.monotonic() + step_s
        while not is_so():
            if time.monotonic() > until:
                raise TimeoutError(f"Waited {step_s:.0f} s for {what}.")
            yield True

    def _until(self, is_so: Callable[[], bool], what: str) -> None:
        for _ in self._wait(is_so, what):
            self.stage.tend()
            time.sleep(0.02)


def judge(run: Run, job: Job) -> dict[str, Any]:
    """Gather what the run found, and what it must not have found."""
    timings = [timing for npu in run.stage.npus for timing in npu.timings()]
    reroutes = sorted(seconds for what, seconds in timings if what == "rerouted")
    leaves = sorted(seconds for what, seconds in timings if what == "left")
    breaches = run.breaches + ([job.error] if job.error else [])
    for name in ("wrong", "twice", "lost", "failed"):
        if count := getattr(job, name):
            breaches.append(f"{count} texts {name}")
    if reroutes and percentile(reroutes, 99) > REROUTE_S:
        breaches.append(f"re-route p99 {percentile(reroutes, 99):.2f} s is over {REROUTE_S} s")
    if leaves and leaves[-1] > LEAVE_S:
        breaches.append(f"left the NPU queue after {leaves[-1]:.2f} s; the bound is {LEAVE_S} s")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"ops/chaos/device_faults.py --faults {run.options.faults} "
        f"--seed {run.options.seed}",
        "machine": machine(),
        "settings": SETTINGS,
        "seconds": round(time.monotonic() - run.stage.began),
        "faults": run.struck,
        "redis": run.redis_struck,
        "texts": job.done,
        "batches on the NPUs": sum(npu.count("batch_done") for npu in run.stage.npus),
        "texts re-routed": job.rerouted,
        "wrong": job.wrong,
        "twice": job.twice,
        "lost": job.lost,
        "failed": job.failed,
        "reroute_s": spread(reroutes),
        "leave_s": spread(leaves),
        "all NPUs dead": run.backlog,
        "breaches": breaches,
    }


def percentile(values: list[float], percent: float) -> float:
    """Return a percentile of sorted values, the next one up."""
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def spread(values: list[float]) -> dict[str, float]:
    """Return count, median, p99 and longest of sorted values."""
    if not values:
        return {"count": 0}
    found = {"p50": percentile(values, 50), "p99": percentile(values, 99), "longest": values[-1]}
    return {"count": len(values), **{name: round(value, 3) for name, value in found.items()}}


def page(of: dict[str, Any]) -> str:
    """Write the findings as Markdown."""
    lines = [f"# Device faults: {'FAILED' if of['breaches'] else 'passed'}", ""]
    for name, value in of.items():
        if isinstance(value, dict):
            lines += ["", f"| {name} | |", "|---|---|"]
            lines += [f"| {key} | {item} |" for key, item in value.items()]
            lines.append("")
        elif name == "breaches":
            lines += [f"- breach: {breach}" for breach in value]
        else:
            lines.append(f"- {name}: {value}")
    return "\n".join(lines) + "\n"


def main() -> NoReturn:
    """Run, write the report, and exit with 1 if anything was breached."""
    parser = argparse.ArgumentParser(prog="ops/chaos/device_faults.py", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="How many strike.")
    parser.add_argument("--seed", type=int, default=1, help="Of the order of faults.")
    parser.add_argument("--report", type=Path, default=ROOT / "ops" / "chaos" / "reports")
    parser.add_argument(
        "--patience",
        type=int,
        default=1,
        help="Times as long for opening the device and for each step, where others are at work.",
    )
    parser.add_argument("--keep", action="store_true", help="Keep the logs.")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eq-"))
    budget_s = int(SETTINGS["EMBEDQ_INIT_TIMEOUT_S"]) * options.patience
    SETTINGS["EMBEDQ_INIT_TIMEOUT_S"] = str(budget_s)
    stage = Stage(folder, [Npu, Npu, CpuWorker])
    run, job = Run(options, stage), Job(stage.urls)
    try:
        stage.wait_ready()
        job.start()
        try:
            run.strike(job)
            run.all_die(job)
        except TimeoutError as error:
            run.breaches.append(str(error))
        job.finish()
        found = judge(run, job)
    finally:
        stage.stop()
    print(page(found))
    options.report.mkdir(parents=True, exist_ok=True)
    name = f"{found['date'][:10]}-devices-{options.faults}-seed{options.seed}"
    (options.report / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.report / f"{name}.md").write_text(page(found))
    if found["breaches"]:
        print(f"logs are in {folder}", file=sys.stderr)
        sys.exit(1)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
