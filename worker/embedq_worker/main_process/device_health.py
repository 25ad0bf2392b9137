"""Health of a worker's NPU: failure detectors, a circuit breaker, and what follows from its state.

Pure: callers pass the clock and what happened; nothing here knows Celery or a runtime.

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
from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq_worker.errors import FailureReason

#: Failures that a sound device may have now and then, such as one text it cannot process or a
#: moment without memory. Any other failure makes the device unhealthy at once.
TOLERATED = frozenset(
    {
        FailureReason.INFER_FAILED,
        FailureReason.DEVICE_ERROR,
        FailureReason.OUT_OF_MEMORY,
        FailureReason.ENGINE_FAILED,
    }
)

#: Failures that another probe cannot change, such as a missing device or compiler.
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

#: Code of an NPU that an operator disabled; it is not probed.
OPERATOR = FailureReason.OPERATOR

#: States in which an NPU must not be used.
UNHEALTHY = (WorkerState.DEGRADED, WorkerState.PROBING)

#: Batches from which SlowdownDetector learns the normal duration of an inference.
LEARN_FROM = 8


class FailureWindow:
    """Counts failed batches of a device within a sliding window."""

    def __init__(self, limit: int, window_s: float) -> None:
        """Tolerate fewer than `limit` failures within `window_s` seconds."""
        self._limit = limit
        self._window_s = window_s
        self._recent: list[float] = []

    def add(self, reason: FailureReason, now_s: float) -> bool:
        """Count a failure; return whether the device has become unhealthy."""
        self._recent = [at for at in self._recent if now_s - at < self._window_s] + [now_s]
        return reason not in TOLERATED or len(self._recent) >= self._limit


class SlowdownDetector:
    """Compares the duration of inferences with that of the first ones.

    Attributes:
        normal_s: normal duration of an inference, seconds; 0 until known.
    """

    def __init__(self, factor: float, batches: int, normal_s: float = 0.0) -> None:
        """Report a slowdown after `batches` consecutive batches took `factor` times as long.

        Args:
            factor: 0 disables the detector.
            batches: consecutive slow batches.
            normal_s: as learnt by an earlier process, so that a device that comes back slow is
                detected as well; 0 learns it from the first batches.
        """
        self._factor = factor
        self._batches = batches
        self._first: list[float] = []
        self.normal_s = normal_s
        self._last: deque[float] = deque(maxlen=batches)

    def add(self, seconds: float) -> bool:
        """Record one batch; return whether the device has become slow.

        Args:
            seconds: per inference of the batch.
        """
        if not self._factor:
            return False
        if not self.normal_s:
            self._first.append(seconds)
            if len(self._first) == LEARN_FROM:
                self.normal_s = statistics.median(self._first)
            return False
        self._last.append(seconds)
        return len(self._last) == self._batches and min(self._last) > self._factor * self.normal_s


class CrashLoopDetector:
    """Counts pool processes that died; Celery would replace them without end."""

    def __init__(self, limit: int, window_s: float) -> None:
        """Report a crash loop after `limit` exits within `window_s` seconds."""
        self._limit = limit
        self._window_s = window_s
        self._last: WorkerStatus | None = None
        self._exits: list[float] = []
        self._early = 0

    def update(self, pool: WorkerStatus, now_s: float, *, ended_pid: int = 0) -> None:
        """Compare the pool process with the one seen before.

        Args:
            pool: its status; a short-lived process may be missed, which only delays detection.
            now_s: monotonic time in seconds.
            ended_pid: process id of the pool process that this worker killed; it does not count.
        """
        last, self._last = self._last, pool
        if pool.state is not WorkerState.STARTING:
            self._early = 0
        if last is None or pool.pool_pid in (0, last.pool_pid) or last.pool_pid in (0, ended_pid):
            return
        self._exits = [at for at in self._exits if now_s - at < self._window_s] + [now_s]
        if pool.state is WorkerState.STARTING and last.state is WorkerState.STARTING:
            self._early += 1

    @property
    def is_loop(self) -> bool:
        """Whether pool processes die repeatedly, in any state."""
        return len(self._exits) >= self._limit

    @property
    def is_early_loop(self) -> bool:
        """Whether pool processes die one after another before they are ready, at any rate."""
        return self._early >= self._limit

    def reset(self) -> None:
        """Start again at 0: the next pool processes run on another device."""
        self._exits, self._early = [], 0


@dataclass(frozen=True, slots=True)
class ProbeBackoff:
    """Exponential backoff between two probes of a degraded NPU.

    Attributes:
        initial_delay_s: delay before the first probe; each failure doubles it.
        max_delay_s: maximum delay.
        reset_after_s: time without a fault after which the delay restarts at its first value.
    """

    initial_delay_s: float
    max_delay_s: float
    reset_after_s: float

    def delay_s(self, count: int) -> float:
        """Return the delay before the next probe after `count` failures in a row."""
        return min(self.initial_delay_s * 2.0 ** min(count - 1, 32), self.max_delay_s)


@dataclass(frozen=True, slots=True)
class DeviceHealth:
    """Health of a worker's NPU: a circuit breaker with half-open probes.

    Attributes:
        state: starting, healthy, degraded (open) or probing (half open).
        code, reason: why it is degraded, as one word and as a sentence.
        state_since: Unix time at which it became healthy or degraded, seconds; a probe keeps it.
        failure_count: how often it failed in a row.
        next_probe_at: Unix time of the next probe, seconds; infinity for never.
    """

    state: WorkerState = WorkerState.STARTING
    code: str = ""
    reason: str = ""
    state_since: float = 0.0
    failure_count: int = 0
    next_probe_at: float = math.inf

    def degraded(
        self,
        code: str,
        reason: str,
        now: float,
        backoff: ProbeBackoff,
        *,
        was_verified: bool = False,
    ) -> DeviceHealth:
        """Return the health after a failure.

        An unhealthy NPU keeps its first reason, unless an operator disables it. An NPU that was
        verified before is probed again even after a permanent failure: while a driver restarts,
        the device is missing for a moment.
        """
        if self.state in UNHEALTHY and code != OPERATOR:
            return self
        settled = (
            self.state is WorkerState.HEALTHY and now - self.state_since >= backoff.reset_after_s
        )
        count = 1 if settled else self.failure_count + 1
        never = code == OPERATOR or (code in PERMANENT_FAILURES and not was_verified)
        probe_at = math.inf if never else now + backoff.delay_s(count)
        return DeviceHealth(WorkerState.DEGRADED, code, reason, now, count, probe_at)

    def probing(self) -> DeviceHealth:
        """Return the health during a probe."""
        return replace(self, state=WorkerState.PROBING, next_probe_at=math.inf)

    def probe_failed(
        self, code: str, reason: str, now: float, backoff: ProbeBackoff
    ) -> DeviceHealth:
        """Return the health after a failed probe: degraded, with a longer delay."""
        count = self.failure_count + 1
        at = now + backoff.delay_s(count)
        # A state_since in the future, after a clock was set back, would make every probe due.
        since = min(self.state_since, now)
        return DeviceHealth(WorkerState.DEGRADED, code, reason, since, count, at)

    def on_probe_passed(self) -> DeviceHealth:
        """Return the health after a passed probe; a new pool process opens the NPU next."""
        return DeviceHealth(WorkerState.STARTING, failure_count=self.failure_count)

    def on_verified(self, now: float) -> DeviceHealth:
        """Return the health after a pool process has opened and verified the NPU."""
        if self.state is WorkerState.HEALTHY:
            return self
        return DeviceHealth(WorkerState.HEALTHY, "", "", now, self.failure_count)

    def probe_now(self, now: float) -> DeviceHealth:
        """Return the health after an operator's `recover`: a probe is due now."""
        return replace(self, next_probe_at=now) if self.state is WorkerState.DEGRADED else self

    def probe_due(self, now: float) -> bool:
        """Return whether a probe is due; a clock that was set back does not delay it."""
        waits = self.state is WorkerState.DEGRADED and not math.isinf(self.next_probe_at)
        return waits and (now >= self.next_probe_at or now < self.state_since)

    @property
    def will_retry(self) -> bool:
        """Whether the NPU is in use or will be probed without an operator."""
        return self.state is not WorkerState.DEGRADED or not math.isinf(self.next_probe_at)


def queues_for(
    worker: WorkerStatus, *, helps: bool = True, paused: bool = False
) -> tuple[Queue, ...]:
    """Return the queues that a worker consumes, in order of preference.

    Strict batches are served by a healthy NPU only, never by a CPU.

    Args:
        worker: its status.
        helps: a CPU worker also consumes the NPU queue.
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
    """Return whether a batch of this queue may be computed on this device.

    A worker that lost its NPU may still hold a strict batch.
    """
    return queue != Queue.NPU_STRICT or device is not Device.CPU
