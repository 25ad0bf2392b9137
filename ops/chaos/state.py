"""The state of one run: inject faults, let the jobs finish, judge the outputs."""

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

#: Seconds between two faults.
GAP_S: Final = (0.5, 2.0)
#: Seconds between two looks at everything, and between two measurements of memory.
TICK_S, MEASURE_EVERY_S = 0.05, 0.5
#: Seconds that jobs may take to end once the faults have.
HOME_S: Final = 180.0
#: Seconds that Redis may take to be clean. A message in the hand of a worker that died comes back
#: after the visibility timeout and the interval of sweeps, 5 s each; a sweeper that was killed
#: keeps the others from sweeping for 30 s more. The rest is for a busy machine.
CLEAN_S: Final = 90.0
#: Seconds without a commit, faults or not, that count as stuck.
STUCK_S: Final = 120.0


@dataclass(slots=True)
class Run:
    """A run and what came of it.

    Attributes:
        log: told of each fault.
        faults: how many of each kind struck.
        stuck: what did not end in time; empty if all did.
        left: what finished jobs left in Redis.
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

    def strike(self) -> None:
        """Let faults strike a working fleet for the time asked for."""
        rng = random.Random(self.options.seed)
        world = faults.World(self.fleet, self.producers, self.watch, rng)
        end = time.monotonic() + 60 * self.options.minutes
        due = self._wait_for_work()
        while time.monotonic() < end and not self.stuck:
            self._tick(more=True)
            if time.monotonic() >= due:
                if kind := faults.inject(world):
                    self.faults[kind] += 1
                    self.say(kind)
                due = time.monotonic() + rng.uniform(*GAP_S)
            if self.watch.silence_s > STUCK_S:
                self.stuck.append(f"no commit for {STUCK_S:.0f} s under faults")

    def bring_home(self) -> None:
        """Let the running jobs end without faults, and Redis become clean."""
        self._until(lambda: all(producer.is_idle() for producer in self.producers), HOME_S)
        for producer in self.producers:
            if producer.task is not None:
                self.stuck.append(f"{producer.task.input.stem} did not end")
        self._until(lambda: not self._leftovers(), CLEAN_S)
        self.left = self._leftovers()

    def judge(self) -> None:
        """Check every output."""
        expected = judge.expected_stub if self.options.engine == "stub" else self._embed_calmly
        for task in self.done:
            judge.judge(task, expected, self.findings)

    def breaches(self) -> list[str]:
        """Say what must not be, one line each."""
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

    def say(self, what: str) -> None:
        """Write a line into the log of the run."""
        print(f"{time.strftime('%H:%M:%S')} {what}", file=self.log)

    def _wait_for_work(self) -> float:
        """Wait for a first commit; return when the first fault is due."""
        started = time.monotonic()
        while not self.watch.commits and time.monotonic() - started < STUCK_S:
            self._tick(more=True)
        return time.monotonic()

    def _until(self, is_so: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not (is_so() and not len(self.fleet.agenda)) and time.monotonic() < deadline:
            self._tick(more=False)

    def _tick(self, *, more: bool) -> None:
        time.sleep(TICK_S)
        self.fleet.tend()
        for producer in self.producers:
            producer.tend(more=more)
            if producer.task is not None and len(producer.task.jobs) > 1:
                self.watch.forget(producer.task.jobs - {producer.task.job})
        self.watch.poll()
        while self.watch.slow:
            self.say(self.watch.slow.pop())
        if time.monotonic() - self._measured > MEASURE_EVERY_S:
            self._measured = time.monotonic()
            for server in self.fleet.servers:
                server.measure()

    def _leftovers(self) -> dict[str, int]:
        return judge.leftovers(self.fleet)

    def _embed_calmly(self, task: Task) -> npt.NDArray[np.float32]:
        output = task.output.with_name(f"calm-{task.output.name}")
        self.producers[0].embed(task, output)
        calm: npt.NDArray[np.float32] = np.load(output)
        return calm
