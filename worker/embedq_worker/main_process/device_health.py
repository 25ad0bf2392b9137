"""State machine and failure detectors of a device.

Signs that a device or a process cannot be trusted, weighed before anything is done about them.

Pure: the clock is passed in.

May a node's NPU be trusted, when is it tried again, and what does the node consume meanwhile.

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
from embedq.protocol.worker import State
from embedq_worker.errors import Reason
from embedq_worker.main_process.status import NodeState

#: Failures that a sound device may have once in a while: a text that it cannot take, a moment
#: without memory. Every other reason ends the trust at once.
FORGIVABLE = frozenset(
    {Reason.INFER_FAILED, Reason.DEVICE_ERROR, Reason.OUT_OF_MEMORY, Reason.ENGINE_FAILED}
)


#: Batches from which a node learns how fast its device is.
LEARN_FROM = 8


class Failures:
    """Failed batches of a device; some are forgiven, until there are too many."""

    def __init__(self, allowed: int, window_s: float) -> None:
        """Forgive fewer than ``allowed`` failures within ``window_s`` seconds."""
        self._allowed = allowed
        self._window_s = window_s
        self._recent: list[float] = []

    def are_too_many(self, reason: Reason, now_s: float) -> bool:
        """Count a failure, and tell whether the device has lost its trust."""
        self._recent = [at for at in self._recent if now_s - at < self._window_s] + [now_s]
        return reason not in FORGIVABLE or len(self._recent) >= self._allowed


class Pace:
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


class Deaths:
    """Children that died; Celery replaces them without end."""

    def __init__(self, allowed: int, window_s: float) -> None:
        """Call ``allowed`` deaths within ``window_s`` seconds a loop."""
        self._allowed = allowed
        self._window_s = window_s
        self._last: NodeState | None = None
        self._all: list[float] = []
        self._early = 0

    def note(self, child: NodeState | None, now_s: float, *, ended: int = 0) -> None:
        """Look at the child once more.

        Args:
            child: what it says; looks may miss a child, which only makes this slower.
            now_s: seconds on a clock that never goes back.
            ended: process id of the child that this node ended itself, which does not count.
        """
        last, self._last = self._last, child
        if child is not None and child.state is not State.STARTING:
            self._early = 0
        if last is None or child is None or child.pid in (0, last.pid) or last.pid in (0, ended):
            return
        self._all = [at for at in self._all if now_s - at < self._window_s] + [now_s]
        if child.state is State.STARTING and last.state is State.STARTING:
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
STRUCTURAL = frozenset(
    {
        Reason.COMPILE_REFUSED,
        Reason.NO_COMPILER,
        "bad_model",
        "no_device",
        "several_devices",
        "device_forbidden",
        "wrong_device",
        "bad_setting",
    }
)


#: An operator took the NPU away; no probe gives it back.
OPERATOR = Reason.OPERATOR


#: States in which an NPU is not to be trusted.
AWAY = (State.DEGRADED, State.PROBING)


@dataclass(frozen=True, slots=True)
class Rules:
    """When a degraded NPU is tried again.

    Attributes:
        probe_first_s: seconds until the first probe; each failure doubles them.
        probe_longest_s: what they grow to.
        settle_s: an NPU that was healthy for this long starts again with the first.
    """

    probe_first_s: float
    probe_longest_s: float
    settle_s: float

    def pause_s(self, count: int) -> float:
        """Return how long the NPU rests after it was given up for the n-th time in a row."""
        return min(self.probe_first_s * 2.0 ** min(count - 1, 32), self.probe_longest_s)


@dataclass(frozen=True, slots=True)
class Health:
    """What a node thinks of its NPU.

    Attributes:
        state: starting, healthy, degraded or probing.
        code: why it is degraded, in a word: a Reason, or the code of an error.
        reason: the same as a sentence.
        since: Unix time at which it became healthy, or was degraded; a probe does not change it.
        count: how often it was given up in a row; how well it must settle is in the rules.
        probe_at: Unix time of the next probe; never is infinity.
    """

    state: State = State.STARTING
    code: str = ""
    reason: str = ""
    since: float = 0.0
    count: int = 0
    probe_at: float = math.inf

    def degraded(
        self, code: str, reason: str, now: float, rules: Rules, *, proven: bool = False
    ) -> Health:
        """Return the health of an NPU that has just done something wrong.

        One that is away already keeps its first reason, unless an operator takes it away. One that
        was proven before may come back whatever it says: a driver that starts anew shows none.
        """
        if self.state in AWAY and code != OPERATOR:
            return self
        settled = self.state is State.HEALTHY and now - self.since >= rules.settle_s
        count = 1 if settled else self.count + 1
        never = code == OPERATOR or (code in STRUCTURAL and not proven)
        probe_at = math.inf if never else now + rules.pause_s(count)
        return Health(State.DEGRADED, code, reason, now, count, probe_at)

    def probing(self) -> Health:
        """Return the health of an NPU that is being tried."""
        return replace(self, state=State.PROBING, probe_at=math.inf)

    def probe_failed(self, code: str, reason: str, now: float, rules: Rules) -> Health:
        """Return the health of an NPU that failed its probe: degraded for longer."""
        count = self.count + 1
        # Whatever it says now, it has been an NPU that could be trusted: it may come back.
        at = now + rules.pause_s(count)
        since = min(self.since, now)  # or a clock that was set back has it probed without a pause
        return Health(State.DEGRADED, code, reason, since, count, at)

    def returning(self) -> Health:
        """Return the health of an NPU that passed its probe; a child opens it next."""
        return Health(State.STARTING, count=self.count)

    def proven(self, now: float) -> Health:
        """Return the health of an NPU that a child has opened and proven."""
        return (
            self if self.state is State.HEALTHY else Health(State.HEALTHY, "", "", now, self.count)
        )

    def recovered(self, now: float) -> Health:
        """Return the health after an operator asked for the NPU back: probed at once."""
        return replace(self, probe_at=now) if self.state is State.DEGRADED else self

    def probe_due(self, now: float) -> bool:
        """Tell whether it is time for a probe; a clock that was set back does not delay it."""
        waits = self.state is State.DEGRADED and not math.isinf(self.probe_at)
        return waits and (now >= self.probe_at or now < self.since)

    @property
    def may_return(self) -> bool:
        """Whether the NPU comes back without a person, or is in place."""
        return self.state is not State.DEGRADED or not math.isinf(self.probe_at)


def queues_for(node: NodeState, *, helps: bool = True, paused: bool = False) -> tuple[Queue, ...]:
    """Return the queues that a node in this state consumes, first choice first.

    Strict batches are for a healthy NPU: no engine on a CPU ever gets one.

    Args:
        node: its state.
        helps: a node of the CPU also takes what waits for an NPU.
        paused: an operator has paused the fleet.
    """
    if paused:
        return ()
    if node.home == Device.NPU:
        if node.device == Device.CPU:
            return (Queue.CPU, Queue.NPU) if node.state in (State.HEALTHY, *AWAY) else ()
        return (Queue.NPU, Queue.NPU_STRICT) if node.state is State.HEALTHY else ()
    if node.state is not State.HEALTHY:
        return ()
    own = (Queue.CPU, Queue.CPU_INT8) if node.card and node.card.quantised else (Queue.CPU,)
    return (*own, Queue.NPU) if helps else own


def may_answer(queue: str, device: Device) -> bool:
    """Tell whether a batch of this queue may be computed on this device.

    A node that lost its NPU may still have a strict batch in hand.
    """
    return queue != Queue.NPU_STRICT or device is not Device.CPU
