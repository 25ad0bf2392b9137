"""State machine and failure detectors of a device.

Signs that a device or a process cannot be trusted, weighed before anything is done about them.

Pure: the clock is passed in.

May a worker's NPU be trusted, when is it tried again, and what does the worker consume meanwhile.

Pure: the clock is passed in, and what happened is told; nothing here knows Celery or a runtime.

    starting -> healthy -> degraded -> probing -> starting
                   ^                     |            |
                   |                     v            |
                   |                  degraded        |
                   +----------------------------------+
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, replace

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import WorkerState
from embedq_worker.errors import FailureReason
from embedq_worker.main_process.status import WorkerStatus

#: Failures that a sound device may have once in a while: a text that it cannot take, a moment
#: without memory. Every other reason ends the trust at once.
FORGIVABLE = frozenset(
    {
        FailureReason.INFER_FAILED,
        FailureReason.DEVICE_ERROR,
        FailureReason.OUT_OF_MEMORY,
        FailureReason.ENGINE_FAILED,
    }
)


#: Batches from which a worker learns how fast its device is.
LEARN_FROM = 8


class FailureWindow:
    """Failed batches of a device; some are forgiven, until there are too many."""

    def __init__(self, allowed: int, window_s: float) -> None:
        """Forgive fewer than ``allowed`` failures within ``window_s`` seconds."""
        self._allowed = allowed
        self._window_s = window_s
        self._recent: list[float] = []

    def are_too_many(self, reason: FailureReason, now_s: float) -> bool:
        """Count a failure, and tell whether the device has lost its trust."""
        self._recent = [at for at in self._recent if now_s - at < self._window_s] + [now_s]
        return reason not in FORGIVABLE or len(self._recent) >= self._allowed


class SlowdownDetector:
    """How fast a device is against how fast it was when it began."""

    def __init__(self, factor: float, batches: int, known_s: float = 0.0) -> None:
        """Call a device slow after ``batches`` in a row that took ``factor`` times as long.

        Args:
            factor: 0 never calls it slow.
            batches: in a row.
            known_s: what an inference took before, so that a device that comes back slow is found
                as well; 0 learns it from the first batches.
        """
        self._factor = factor
        self._batches = batches
        self._first: list[float] = []
        self.known_s = known_s
        self._row: deque[float] = deque(maxlen=batches)

    def is_slow(self, seconds: float) -> bool:
        """Take note of one batch, and tell whether the device has become slow.

        Args:
            seconds: for each inference of the batch.
        """
        if not self._factor:
            return False
        if not self.known_s:
            self._first.append(seconds)
            if len(self._first) == LEARN_FROM:
                self.known_s = statistics.median(self._first)
            return False
        self._row.append(seconds)
        return len(self._row) == self._batches and min(self._row) > self._factor * self.known_s


class CrashLoopDetector:
    """Children that died; Celery replaces them without end."""

    def __init__(self, allowed: int, window_s: float) -> None:
        """Call ``allowed`` deaths within ``window_s`` seconds a loop."""
        self._allowed = allowed
        self._window_s = window_s
        self._last: WorkerStatus | None = None
        self._all: list[float] = []
        self._early = 0

    def note(self, child: WorkerStatus | None, now_s: float, *, ended: int = 0) -> None:
        """Look at the child once more.

        Args:
            child: what it says; looks may miss a child, which only makes this slower.
            now_s: seconds on a clock that never goes back.
            ended: process id of the child that this worker ended itself, which does not count.
        """
        last, self._last = self._last, child
        if child is not None and child.state is not WorkerState.STARTING:
            self._early = 0
        if last is None or child is None or child.pid in (0, last.pid) or last.pid in (0, ended):
            return
        self._all = [at for at in self._all if now_s - at < self._window_s] + [now_s]
        if child.state is WorkerState.STARTING and last.state is WorkerState.STARTING:
            self._early += 1

    @property
    def is_loop(self) -> bool:
        """Whether children die again and again, whatever they were at."""
        return len(self._all) >= self._allowed

    @property
    def is_early_loop(self) -> bool:
        """Whether children die before they are ready, one after the other, however slowly."""
        return self._early >= self._allowed

    def forget(self) -> None:
        """Begin again: the next children run on another device."""
        self._all, self._early = [], 0


#: Trying again changes nothing: a machine without the device, a compiler that is not installed.
PERMANENT_FAILURES = frozenset(
    {
        FailureReason.COMPILE_REFUSED,
        FailureReason.NO_COMPILER,
        "bad_model",
        "no_device",
        "several_devices",
        "device_forbidden",
        "wrong_device",
        "bad_setting",
    }
)


#: An operator took the NPU away; no probe gives it back.
OPERATOR = FailureReason.OPERATOR


#: States in which an NPU is not to be trusted.
UNHEALTHY = (WorkerState.DEGRADED, WorkerState.PROBING)


@dataclass(frozen=True, slots=True)
class ProbeBackoff:
    """When a degraded NPU is tried again.

    Attributes:
        probe_initial_delay_s: seconds until the first probe; each failure doubles them.
        probe_max_delay_s: what they grow to.
        settle_s: an NPU that was healthy for this long starts again with the first.
    """

    initial_delay_s: float
    max_delay_s: float
    reset_after_s: float

    def pause_s(self, count: int) -> float:
        """Return how long the NPU rests after it was given up for the n-th time in a row."""
        return min(self.initial_delay_s * 2.0 ** min(count - 1, 32), self.max_delay_s)


@dataclass(frozen=True, slots=True)
class DeviceHealth:
    """What a worker thinks of its NPU.

    Attributes:
        state: starting, healthy, degraded or probing.
        code: why it is degraded, in a word: a Reason, or the code of an error.
        reason: the same as a sentence.
        since: Unix time at which it became healthy, or was degraded; a probe does not change it.
        count: how often it was given up in a row; how well it must settle is in the rules.
        probe_at: Unix time of the next probe; never is infinity.
    """

    state: WorkerState = WorkerState.STARTING
    code: str = ""
    reason: str = ""
    state_since: float = 0.0
    failure_count: int = 0
    next_probe_at: float = math.inf

    def degraded(
        self, code: str, reason: str, now: float, rules: ProbeBackoff, *, proven: bool = False
    ) -> DeviceHealth:
        """Return the health of an NPU that has just done something wrong.

        One that is away already keeps its first reason, unless an operator takes it away. One that
        was proven before may come back whatever it says: a driver that starts anew shows none.
        """
        if self.state in UNHEALTHY and code != OPERATOR:
            return self
        settled = (
            self.state is WorkerState.HEALTHY and now - self.state_since >= rules.reset_after_s
        )
        count = 1 if settled else self.failure_count + 1
        never = code == OPERATOR or (code in PERMANENT_FAILURES and not proven)
        probe_at = math.inf if never else now + rules.pause_s(count)
        return DeviceHealth(WorkerState.DEGRADED, code, reason, now, count, probe_at)

    def probing(self) -> DeviceHealth:
        """Return the health of an NPU that is being tried."""
        return replace(self, state=WorkerState.PROBING, next_probe_at=math.inf)

    def probe_failed(self, code: str, reason: str, now: float, rules: ProbeBackoff) -> DeviceHealth:
        """Return the health of an NPU that failed its probe: degraded for longer."""
        count = self.failure_count + 1
        # Whatever it says now, it has been an NPU that could be trusted: it may come back.
        at = now + rules.pause_s(count)
        since = min(
            self.state_since, now
        )  # or a clock that was set back has it probed without a pause
        return DeviceHealth(WorkerState.DEGRADED, code, reason, since, count, at)

    def on_probe_passed(self) -> DeviceHealth:
        """Return the health of an NPU that passed its probe; a child opens it next."""
        return DeviceHealth(WorkerState.STARTING, failure_count=self.failure_count)

    def on_verified(self, now: float) -> DeviceHealth:
        """Return the health of an NPU that a child has opened and proven."""
        return (
            self
            if self.state is WorkerState.HEALTHY
            else DeviceHealth(WorkerState.HEALTHY, "", "", now, self.failure_count)
        )

    def probe_now(self, now: float) -> DeviceHealth:
        """Return the health after an operator asked for the NPU back: probed at once."""
        return replace(self, next_probe_at=now) if self.state is WorkerState.DEGRADED else self

    def probe_due(self, now: float) -> bool:
        """Tell whether it is time for a probe; a clock that was set back does not delay it."""
        waits = self.state is WorkerState.DEGRADED and not math.isinf(self.next_probe_at)
        return waits and (now >= self.next_probe_at or now < self.state_since)

    @property
    def will_retry(self) -> bool:
        """Whether the NPU comes back without a person, or is in place."""
        return self.state is not WorkerState.DEGRADED or not math.isinf(self.next_probe_at)


def queues_for(
    worker: WorkerStatus, *, helps: bool = True, paused: bool = False
) -> tuple[Queue, ...]:
    """Return the queues that a worker in this state consumes, first choice first.

    Strict batches are for a healthy NPU: no engine on a CPU ever gets one.

    Args:
        worker: its state.
        helps: a worker of the CPU also takes what waits for an NPU.
        paused: an operator has paused the fleet.
    """
    if paused:
        return ()
    if worker.assigned_device == Device.NPU:
        if worker.device == Device.CPU:
            return (
                (Queue.CPU, Queue.NPU) if worker.state in (WorkerState.HEALTHY, *UNHEALTHY) else ()
            )
        return (Queue.NPU, Queue.NPU_STRICT) if worker.state is WorkerState.HEALTHY else ()
    if worker.state is not WorkerState.HEALTHY:
        return ()
    own = (
        (Queue.CPU, Queue.CPU_INT8)
        if worker.model_info and worker.model_info.quantized
        else (Queue.CPU,)
    )
    return (*own, Queue.NPU) if helps else own


def may_answer(queue: str, device: Device) -> bool:
    """Tell whether a batch of this queue may be computed on this device.

    A worker that lost its NPU may still have a strict batch in hand.
    """
    return queue != Queue.NPU_STRICT or device is not Device.CPU
