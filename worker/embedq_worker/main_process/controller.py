"""Decide which queues to consume and when to replace the pool process.

How a worker is, from what its child says of itself and what its parent thinks of the NPU. Pure.

What a worker does about its NPU and its child, decided in the parent.

A child tells how it is, and may die, hang or be wrong at any moment; the clock goes on, probes come
back, and an operator may want something else. The guard looks at all of it a few times a second and
says what to consume and which child to replace. It touches no queue and no pool itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import WorkerState
from embedq_worker.device.placement import Placement
from embedq_worker.errors import FailureReason
from embedq_worker.exit_codes import CRASH_LOOP, ENGINE, FAILURE
from embedq_worker.main_process.device_health import (
    OPERATOR,
    UNHEALTHY,
    CrashLoopDetector,
    DeviceHealth,
    ProbeBackoff,
    queues_for,
)
from embedq_worker.main_process.probe import DeviceProbe, ProbeResult
from embedq_worker.main_process.status import WorkerStatus
from embedq_worker.settings import WorkerSettings


def merge_status(
    child: WorkerStatus, health: DeviceHealth, *, leaves: bool, held: bool
) -> WorkerStatus:
    """Return how a worker is, for itself and for everybody else.

    Args:
        child: what the child says.
        health: what the worker thinks of its NPU.
        leaves: the child has been ended, or will be as soon as it holds no batch.
        held: an operator keeps the worker as it is.
    """
    if health.state in UNHEALTHY:
        state = child
        if child.state is WorkerState.STARTING or leaves:
            # Its replacement is on the way; nothing computes.
            state = replace(child, device="", engine="", precision="")
        return replace(
            state,
            state=health.state,
            code=health.code,
            reason=health.reason,
            state_since=health.state_since,
            failure_count=health.failure_count,
            next_probe_at=0.0 if health.next_probe_at == float("inf") else health.next_probe_at,
            will_retry=health.will_retry or held,
        )
    if leaves:
        return replace(child, state=WorkerState.STARTING, device="", engine="", precision="")
    return replace(child, failure_count=health.failure_count)


log = logging.getLogger(__name__)


#: Time without a fault after which the delay before a probe restarts at its first value, seconds.
PROBE_RESET_AFTER_S = 600.0


#: Starts a probe: deadline in seconds, now in monotonic seconds.
StartProbe = Callable[[float, float], DeviceProbe]


class WorkerController:
    """Guards one worker.

    Attributes:
        placement: where the next child is to open its engine; None lets it find out.
        ends_with: exit code, once the worker must end; 0 while it need not.
        replaces: process id of a child that is to be replaced as soon as it holds no batch.
        kills: process id of a child that is to be ended at once.
        paused: an operator has paused the fleet.
        pace_s: seconds that an inference took on the NPU at first; 0 until that is known.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        placement: Placement | None,
        start_probe: StartProbe = DeviceProbe,
    ) -> None:
        self.placement = placement
        self._assigned = None if placement is None or placement.degraded else placement
        self.exit_code = 0
        self.drain_pid = 0
        self.kill_pid = 0
        self._settings = settings
        self._start_probe = start_probe
        self._backoff = ProbeBackoff(
            settings.probe_initial_delay_s, settings.probe_max_delay_s, PROBE_RESET_AFTER_S
        )
        self._deaths = CrashLoopDetector(settings.crash_loop_limit, settings.crash_loop_window_s)
        self._probe: DeviceProbe | None = None
        self._ended = self._starting = 0
        self._starting_since_s = 0.0
        self._was_proven = self._served = False
        self._held = self._kill_first_child = False
        self._exit_reason = ""
        self._child: WorkerStatus | None = None
        self._began = time.time()
        self._health = DeviceHealth()
        self.paused = False
        self.pace_s = 0.0
        if placement is not None and placement.degraded:
            self._health = DeviceHealth().degraded(
                FailureReason.CRASH_LOOP, placement.reason, self._began, self._backoff
            )

    @property
    def health(self) -> DeviceHealth:
        """What the worker thinks of its NPU."""
        return self._health

    def update(self, child: WorkerStatus | None, now: float, now_s: float) -> None:
        """Take note of everything, and decide.

        Args:
            child: what the child says of itself; None before the first has spoken, and where its
                file was cleared away: then what it said last holds.
            now: Unix time in seconds.
            now_s: seconds on a clock that never goes back.
        """
        child = self._child = child or self._child
        self._served = self._served or (child is not None and child.state is WorkerState.HEALTHY)
        self._deaths.note(child, now_s, ended=self._ended)
        if child is not None and self._kill_first_child:
            self._kill_first_child, self.kill_pid = (
                False,
                child.pid,
            )  # it was sent to the NPU before the order
        elif child is not None and child.pid == self.drain_pid:
            if self._hangs(child, now_s):
                self.kill_pid = child.pid
        elif child is not None and child.pid != self._ended:
            self._judge(child, now, now_s)
        self._watch_probe(now, now_s)

    def queues_to_consume(self) -> tuple[Queue, ...]:
        """Return the queues to consume now."""
        if self.drain_pid or self.kill_pid:
            return ()
        return queues_for(
            self.status(), helps=self._settings.cpu_serves_npu_queue, paused=self.paused
        )

    def status(self) -> WorkerStatus:
        """Return how the worker is, for itself and for everybody else."""
        if self._child is None:
            return WorkerStatus(WorkerState.STARTING, self._began, 0)
        leaves = self._child.pid in (self.drain_pid, self._ended)
        return merge_status(self._child, self._health, leaves=leaves, held=self._held)

    def final_status(self) -> WorkerStatus | None:
        """Return how a worker that gives up is; None for one that leaves in good order or
        returns.
        """
        if not self.exit_code or self.exit_code == FAILURE:
            return None
        last = replace(
            self.status(), device="", engine="", precision="", model_info=None, will_retry=False
        )
        code = last.code if self.exit_code == ENGINE else FailureReason.CRASH_LOOP
        return last.transition(WorkerState.FAILED, self._exit_reason, code)

    def replaced(self, pid: int) -> None:
        """Take note that a child was ended because this guard said so."""
        self._ended, self.drain_pid, self.kill_pid = pid, 0, 0

    def disable_npu(self, reason: str, now: float) -> None:
        """Do as an operator wants: keep off the NPU, or out of all queues where there is none."""
        if self._held and self._health.reason == reason:
            return
        self._held = True
        self._degrade(OPERATOR, reason, now)

    def enable_npu(self, now: float) -> None:
        """Do as an operator wants: trust the worker again, once it has proven itself."""
        self._held = False
        if self._health.state is not WorkerState.DEGRADED:
            return
        if self._has_npu:
            self._health = self._health.probe_now(now)
        else:
            self._health = DeviceHealth()
        log.warning("device_recovery_requested worker=%s", self._settings.name)

    def stop(self) -> None:
        """End a probe that is under way."""
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    @property
    def npu_unhealthy(self) -> bool:
        """Whether a batch that comes back now should go to the CPU."""
        return self._has_npu and self._health.state in UNHEALTHY

    @property
    def _has_npu(self) -> bool:
        if self.placement is not None:
            return self.placement.assigned_device is Device.NPU
        return self._child is not None and self._child.assigned_device == Device.NPU

    @property
    def _is_settled(self) -> bool:
        """Whether nothing else is under way that a probe would hold up."""
        child = self._child
        if child is None or child.state is WorkerState.STARTING or child.pid == self._ended:
            return False
        return not (self.drain_pid or self.kill_pid or self._held)

    @property
    def _on_npu(self) -> bool:
        """Whether the child that is there was sent to the NPU."""
        return self._has_npu and not (self.placement is not None and self.placement.degraded)

    def _judge(self, child: WorkerStatus, now: float, now_s: float) -> None:
        if child.state is WorkerState.FAILED:
            self._init_failed(child, now)
        elif not self._on_npu:
            if self._deaths.is_early_loop:
                self._end(CRASH_LOOP, "its child died again and again before it was ready")
            elif self._has_npu and child.state is WorkerState.HEALTHY:
                self.drain_pid = child.pid  # it opened the NPU before that was given up
        elif self._held and child.state is not WorkerState.DEGRADED:
            self._degrade(OPERATOR, self._health.reason, now)  # it said too late where it is
        elif self._deaths.is_loop:
            deaths, window_s = self._settings.crash_loop_limit, self._settings.crash_loop_window_s
            if self._settings.strict and not self._was_proven:
                self._end(CRASH_LOOP, "its child died again and again before it was ready")
            else:
                reason = f"Its process died {deaths} times in {window_s:g} s."
                self._degrade(FailureReason.CRASH_LOOP, reason, now)
        elif child.state is WorkerState.DEGRADED and child.code:
            self._degrade(child.code, child.reason, now)
        elif child.state is WorkerState.STARTING:
            self._watch_start(child, now, now_s)
        elif self._hangs(child, now_s):
            self._degrade(
                FailureReason.DEADLINE,
                f"The engine took longer than {self._settings.engine_timeout_s:g} s for a batch.",
                now,
            )
            self.kill_pid = child.pid
        elif child.state is WorkerState.HEALTHY:
            self._was_proven = True
            self.pace_s = child.pace_s or self.pace_s
            if self._health.state is not WorkerState.HEALTHY:
                self._health = self._health.on_verified(now)

    def _hangs(self, child: WorkerStatus, now_s: float) -> bool:
        return 0 < child.busy_since < now_s - self._settings.engine_timeout_s

    def _init_failed(self, child: WorkerStatus, now: float) -> None:
        strict = self._settings.strict and not self._was_proven
        if self._on_npu and not strict:
            self._degrade(child.code or FailureReason.INIT_FAILED, child.reason, now)
        else:
            # Where it has worked before, a fresh start may mend it; if not, that one is the last.
            self._end(FAILURE if self._served else ENGINE, child.reason)

    def _watch_start(self, child: WorkerStatus, now: float, now_s: float) -> None:
        budget_s = self._settings.init_timeout_s
        if child.pid != self._starting:
            # Not by the time of day, which jumps when a clock is set and when a laptop wakes up.
            self._starting, self._starting_since_s = child.pid, now_s
        if now_s - self._starting_since_s <= budget_s:
            return
        reason = f"Opening the device took longer than {budget_s:g} s."
        if self._settings.strict and not self._was_proven:
            self._end(ENGINE, reason)
        else:
            self._degrade(FailureReason.INIT_TIMEOUT, reason, now)

    def _degrade(self, code: str, reason: str, now: float) -> None:
        before = self._health
        self._health = before.degraded(code, reason, now, self._backoff, proven=self._was_proven)
        if self._health == before:
            return
        log.error(
            "degraded worker=%s code=%s count=%d probe_in_s=%s reason=%s",
            self._settings.name,
            code,
            self._health.failure_count,
            "never"
            if self._health.next_probe_at == float("inf")
            else f"{self._health.next_probe_at - now:.1f}",
            reason,
        )
        self.stop()
        if self._on_npu:
            self._deaths.forget()  # the next children run elsewhere
            self.placement = Placement(Device.CPU, Device.NPU, reason)
            self._kill_first_child = self._child is None
            if self._child is not None and self._child.state is WorkerState.STARTING:
                # A batch may wait for it to be ready, which it may never be.
                self.kill_pid = self._child.pid
            elif self._child is not None:
                self.drain_pid = self._child.pid

    def _watch_probe(self, now: float, now_s: float) -> None:
        if self._probe is None:
            if self._has_npu and self._is_settled and self._health.probe_due(now):
                log.info(
                    "probing worker=%s count=%d", self._settings.name, self._health.failure_count
                )
                self._health = self._health.probing()
                self._probe = self._start_probe(self._settings.init_timeout_s, now_s)
            return
        finding = self._probe.poll(now_s)
        if finding is not None:
            self._probe = None
            self._probed(finding, now)

    def _probed(self, finding: ProbeResult, now: float) -> None:
        if not finding.passed:
            self._health = self._health.probe_failed(
                finding.code, finding.reason, now, self._backoff
            )
            log.warning(
                "probe_failed worker=%s code=%s count=%d probe_in_s=%.1f reason=%s",
                self._settings.name,
                finding.code,
                self._health.failure_count,
                self._health.next_probe_at - now,
                finding.reason,
            )
            return
        log.info("probe_passed worker=%s seconds=%.2f", self._settings.name, finding.seconds)
        self._health = self._health.on_probe_passed()
        self.placement = self._assigned
        self.drain_pid = self._child.pid if self._child else 0

    def _end(self, code: int, reason: str) -> None:
        if not self.exit_code:
            log.error("worker_shutdown worker=%s reason=%s", self._settings.name, reason)
            self.exit_code, self._exit_reason = code, reason
