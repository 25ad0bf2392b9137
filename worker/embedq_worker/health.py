"""May a node's NPU be trusted, when is it tried again, and what does the node consume meanwhile.

Pure: the clock is passed in, and what happened is told; nothing here knows Celery or a runtime.

    starting -> healthy -> degraded -> probing -> starting
                   ^                     |            |
                   |                     v            |
                   |                  degraded        |
                   +----------------------------------+
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from embedq.contract import Device, Queue
from embedq_worker.errors import Reason
from embedq_worker.state import NodeState, State

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
