"""Hold the state of one chaos run: inject faults, let the jobs finish, check the outputs."""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TextIO

import numpy as np
import numpy.typing as npt
from ops.chaos import faults, judge
from ops.chaos.fleet import Fleet
from ops.chaos.producers import Producer, Task
from ops.chaos.watch import Watch

#: Minimum and maximum seconds between two faults.
GAP_S: Final = (0.5, 2.0)
#: Seconds between two polls of the processes, and between two measurements of Redis memory.
TICK_S, MEASURE_EVERY_S = 0.05, 0.5
#: Seconds that jobs may take to finish after the last fault.
FINISH_S: Final = 180.0
#: Seconds in which Redis must be clean after that. A message of a killed worker is restored after
#: the visibility timeout and one sweep interval; a killed sweeper blocks the others for 30 s more.
CLEAN_S: Final = 90.0
#: Seconds without a commit after which the run counts as stuck.
STUCK_S: Final = 120.0


@dataclass(slots=True)
class Run:
    """One run and its results.

    Attributes:
        log: receives one line per fault.
        faults: kind -> number of injected faults.
        stuck: jobs that did not finish in time, as messages.
        left: Redis key or kind of keys -> what finished jobs left there.
    """

    options: argparse.Namespace
    fleet: Fleet
    producers: list[Producer]
    watch: Watch
    log: TextIO
    faults: Counter[str] = field(default_factory=Counter)
    stuck: list[str] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    findings: judge.Findings = field(default_factory=judge.Findings)
    _measured: float = 0.0

    @property
    def done(self) -> list[Task]:
        """Tasks whose output is finished."""
        return [task for producer in self.producers for task in producer.done]

    def inject_faults(self) -> None:
        """Inject random faults for `--minutes`."""
        rng = random.Random(self.options.seed)
        targets = faults.Targets(self.fleet, self.producers, self.watch, rng)
        end = time.monotonic() + 60 * self.options.minutes
        due = self._wait_for_work()
        while time.monotonic() < end and not self.stuck:
            self._tick(more=True)
            if time.monotonic() >= due:
                if kind := faults.inject(targets):
                    self.faults[kind] += 1
                    self.log_line(kind)
                due = time.monotonic() + rng.uniform(*GAP_S)
            if self.watch.silence_s > STUCK_S:
                self.stuck.append(f"no commit for {STUCK_S:.0f} s under faults")

    def finish_jobs(self) -> None:
        """Wait until the running jobs have finished and Redis is clean."""
        self._until(lambda: all(producer.is_idle() for producer in self.producers), FINISH_S)
        for producer in self.producers:
            if producer.task is not None:
                self.stuck.append(f"{producer.task.input.stem} did not finish")
        self._until(lambda: not self._leftovers(), CLEAN_S)
        self.left = self._leftovers()

    def judge(self) -> None:
        """Check every output."""
        expected = (
            judge.expected_stub if self.options.engine == "stub" else self._embed_without_faults
        )
        for task in self.done:
            judge.judge(task, expected, self.findings)

    def breaches(self) -> list[str]:
        """Return every failed check, one line each."""
        found = list(self.stuck)
        if self.findings.breaches():
            found.append("outputs: " + "; ".join(self.findings.examples))
        if self.left:
            found.append(f"left in Redis: {self.left}")
        for producer in self.producers:
            found += [f"a producer gave up: {reason}" for reason in producer.gave_up]
        if not self.done:
            found.append("no job was finished")
        return found

    def log_line(self, line: str) -> None:
        """Append a line to the log of faults."""
        print(f"{time.strftime('%H:%M:%S')} {line}", file=self.log)

    def _wait_for_work(self) -> float:
        started = time.monotonic()
        while not self.watch.commits and time.monotonic() - started < STUCK_S:
            self._tick(more=True)
        return time.monotonic()

    def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (condition() and not len(self.fleet.schedule)) and time.monotonic() < deadline:
            self._tick(more=False)

    def _tick(self, *, more: bool) -> None:
        time.sleep(TICK_S)
        self.fleet.poll()
        for producer in self.producers:
            producer.poll(more=more)
            if producer.task is not None and len(producer.task.jobs) > 1:
                self.watch.forget(producer.task.jobs - {producer.task.job})
        self.watch.poll()
        while self.watch.slow:
            self.log_line(self.watch.slow.pop())
        if time.monotonic() - self._measured > MEASURE_EVERY_S:
            self._measured = time.monotonic()
            for server in self.fleet.servers:
                server.measure()

    def _leftovers(self) -> dict[str, int]:
        return judge.leftovers(self.fleet)

    def _embed_without_faults(self, task: Task) -> npt.NDArray[np.float32]:
        output = task.output.with_name(f"reference-{task.output.name}")
        self.producers[0].embed(task, output)
        vectors: npt.NDArray[np.float32] = np.load(output)
        return vectors
