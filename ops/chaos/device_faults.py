#!/usr/bin/env python3
"""Inject scripted faults into two emulated NPUs while a job runs, and check every vector.

    ops/chaos/device_faults.py [--faults N] [--seed S] [--report DIR]

Two workers with a stub NPU and one on the CPU serve a job of 16-text batches. After each fault an
NPU worker must degrade, reroute its batch and recover. At intervals the broker is killed or drops
its clients while a worker is degraded. At the end all NPUs fail: the CPU worker must go on alone,
and a repaired NPU must serve again after one probe.

Exits with 1 if a text is lost, wrong or delivered twice, or if a bound is exceeded.
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

from ops.chaos.device_fleet import SETTINGS, CpuWorker, DeviceFleet, Npu  # noqa: E402 # the path comes first
from ops.chaos.device_job import Job  # noqa: E402 # as above
from ops.chaos.report import machine  # noqa: E402 # as above

#: Kind of fault -> line of the fault script.
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
#: Every so many device faults, Redis is disturbed as well.
REDIS_FAULT_EVERY: Final = 25
#: Seconds for which a degraded worker is watched after that.
WATCH_AFTER_REDIS_FAULT_S: Final = 2.0
#: Timeout of one step, seconds.
STEP_S: Final = 60.0
#: Bounds, seconds: fault detected -> batch rerouted (p99), degraded -> NPU queue cancelled.
REROUTE_S, LEAVE_S = 2.0, 0.5

#: Steps for one NPU, run concurrently with those of the other; yields True whenever it waits.
Steps = Iterator[bool]


class Run:
    """One run and its results."""

    def __init__(self, options: argparse.Namespace, fleet: DeviceFleet) -> None:
        self.options = options
        self.fleet = fleet
        self.rng = random.Random(options.seed)
        self.injected: dict[str, int] = dict.fromkeys(FAULTS, 0)
        self.redis_faults = {"kill -9 of Redis": 0, "CLIENT KILL": 0}
        self.breaches: list[str] = []
        self.backlog: dict[str, Any] = {}

    def inject_faults(self, job: Job) -> None:
        """Inject `--faults` faults into both NPUs concurrently."""
        cycles = [self._fault_cycles(npu) for npu in self.fleet.npus]
        while cycles and not job.error:
            cycles = [cycle for cycle in cycles if next(cycle, False)]
            self.fleet.poll()
            time.sleep(0.02)

    def _fault_cycles(self, npu: Npu) -> Steps:
        while sum(self.injected.values()) < self.options.faults:
            kind = min(FAULTS, key=lambda kind: (self.injected[kind], self.rng.random()))
            self.injected[kind] += 1
            number = sum(self.injected.values())
            if kind == "slow":
                yield from self._wait(
                    npu.has_latency_baseline, f"the latency baseline of {npu.name}"
                )
            npu.inject(FAULTS[kind])
            yield from self._wait(lambda: npu.has_degraded(), f"{npu.name} to degrade after {kind}")
            if number % REDIS_FAULT_EVERY == 0:
                yield from self._disturb_redis(npu)
            npu.clear_fault()
            yield from self._wait(
                lambda: npu.has_recovered(), f"{npu.name} to recover after {kind}"
            )

    def _disturb_redis(self, npu: Npu) -> Steps:
        # The worker must not consume the NPU queue again after the reconnect.
        kind = self.rng.choice(list(self.redis_faults))
        self.redis_faults[kind] += 1
        before = npu.count("received")
        if kind == "CLIENT KILL":
            self.fleet.kill_clients()
        else:
            self.fleet.restart_broker()
        until = time.monotonic() + WATCH_AFTER_REDIS_FAULT_S
        while time.monotonic() < until:
            yield True
        if npu.count("received") > before:
            self.breaches.append(f"{npu.name} received a batch while degraded, after {kind}")

    def fail_all_npus(self, job: Job) -> None:
        """Fail all NPUs, wait until the CPU worker has made progress, and repair one NPU."""
        for npu in self.fleet.npus:
            npu.inject("infer=device_lost")
        self._until(
            lambda: all(npu.has_degraded() for npu in self.fleet.npus), "all NPUs to degrade"
        )
        before, began = job.done, time.monotonic()
        self._until(
            lambda: job.done >= before + 512 or bool(job.error), "the CPU worker to go on alone"
        )
        alone_s = time.monotonic() - began
        one = self.fleet.npus[0]
        served, passed = one.count("batch_done"), one.count("probe_passed")
        one.clear_fault()
        self._until(one.has_recovered, "one NPU to recover")
        self._until(lambda: one.count("batch_done") > served, "a batch of the recovered NPU")
        self.backlog = {
            "texts drained by the CPU alone": job.done - before,
            "seconds for the first 512": round(alone_s, 1),
            "passed probes until the NPU served again": one.count("probe_passed") - passed,
        }

    def _wait(self, condition: Callable[[], bool], what: str) -> Steps:
        step_s = STEP_S * self.options.patience
        until = time.monotonic() + step_s
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"Waited {step_s:.0f} s for {what}.")
            yield True

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in self._wait(condition, what):
            self.fleet.poll()
            time.sleep(0.02)


def judge(run: Run, job: Job) -> dict[str, Any]:
    """Return the content of the report."""
    timings = [timing for npu in run.fleet.npus for timing in npu.timings()]
    reroutes = sorted(seconds for what, seconds in timings if what == "rerouted")
    leaves = sorted(seconds for what, seconds in timings if what == "left")
    breaches = run.breaches + ([job.error] if job.error else [])
    for name in ("wrong", "twice", "lost", "failed"):
        if count := getattr(job, name):
            breaches.append(f"{count} texts {name}")
    if reroutes and percentile(reroutes, 99) > REROUTE_S:
        breaches.append(f"reroute p99 {percentile(reroutes, 99):.2f} s is over {REROUTE_S} s")
    if leaves and leaves[-1] > LEAVE_S:
        breaches.append(
            f"cancelled the NPU queue after {leaves[-1]:.2f} s; the bound is {LEAVE_S} s"
        )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"ops/chaos/device_faults.py --faults {run.options.faults} "
        f"--seed {run.options.seed}",
        "machine": machine(),
        "settings": SETTINGS,
        "seconds": round(time.monotonic() - run.fleet.began),
        "faults": run.injected,
        "redis": run.redis_faults,
        "texts": job.done,
        "batches on the NPUs": sum(npu.count("batch_done") for npu in run.fleet.npus),
        "texts rerouted": job.rerouted,
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
    """Return a percentile of sorted values, rounded up to a value."""
    return values[min(len(values) - 1, int(len(values) * percent / 100))]


def spread(values: list[float]) -> dict[str, float]:
    """Return count, median, p99 and longest of sorted values."""
    if not values:
        return {"count": 0}
    found = {"p50": percentile(values, 50), "p99": percentile(values, 99), "longest": values[-1]}
    return {"count": len(values), **{name: round(value, 3) for name, value in found.items()}}


def page(of: dict[str, Any]) -> str:
    """Return the report as Markdown."""
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
    """Run, write the report, and exit with 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="ops/chaos/device_faults.py", description=__doc__)
    parser.add_argument("--faults", type=int, default=100, help="Number of device faults.")
    parser.add_argument("--seed", type=int, default=1, help="Seed of the order of faults.")
    parser.add_argument("--report", type=Path, default=ROOT / "ops" / "chaos" / "reports")
    parser.add_argument(
        "--patience",
        type=int,
        default=1,
        help="Factor on the timeouts of device opening and of each step, for a busy machine.",
    )
    parser.add_argument("--keep", action="store_true", help="Keep the logs.")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="eq-"))
    budget_s = int(SETTINGS["EMBEDQ_INIT_TIMEOUT_S"]) * options.patience
    SETTINGS["EMBEDQ_INIT_TIMEOUT_S"] = str(budget_s)
    fleet = DeviceFleet(folder, [Npu, Npu, CpuWorker])
    run, job = Run(options, fleet), Job(fleet.urls)
    try:
        fleet.wait_ready()
        job.start()
        try:
            run.inject_faults(job)
            run.fail_all_npus(job)
        except TimeoutError as error:
            run.breaches.append(str(error))
        job.finish()
        found = judge(run, job)
    finally:
        fleet.stop()
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
