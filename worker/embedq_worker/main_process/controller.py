"""Decide which queues to consume and when to replace the pool process.

Runs in the main process. `update()` is called every 200 ms with the pool process's status and the
clock; probe results and operator commands are further inputs. Apart from starting a probe this
module does no I/O: bootsteps apply its decisions.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isinf

from embedq.protocol.contract import Device, Queue
from embedq.protocol.worker import WorkerState, WorkerStatus
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
from embedq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Time without a fault after which the delay before a probe restarts at its first value, seconds.
PROBE_RESET_AFTER_S = 600.0

#: Starts a probe; arguments: timeout in seconds, now in monotonic seconds.
StartProbe = Callable[[float, float], DeviceProbe]


class WorkerController:
    """Controls one worker.

    Attributes:
        placement: where the next pool process opens its engine; None lets it choose.
        exit_code: exit code with which the worker must end; 0 while it must not.
        drain_pid: process id of a pool process to replace once it holds no batch; 0 for none.
        kill_pid: process id of a pool process to kill now; 0 for none.
        paused: an operator has paused the fleet.
        inference_s: duration of an NPU inference when the device was new, seconds; 0 if unknown.
        ended_totals: last counters of the pool processes before the present one, added up.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        placement: Placement | None,
        start_probe: StartProbe = DeviceProbe,
    ) -> None:
        self.placement = placement
        self._assigned = None if placement is None or placement.degraded else placement
        self.exit_code = self.drain_pid = self.kill_pid = 0
        self.paused = False
        self.inference_s = 0.0
        self.ended_totals: Counter[str] = Counter()
        self._settings = settings
        self._start_probe = start_probe
        self._backoff = ProbeBackoff(
            settings.probe_initial_delay_s, settings.probe_max_delay_s, PROBE_RESET_AFTER_S
        )
        self._exits = CrashLoopDetector(settings.crash_loop_limit, settings.crash_loop_window_s)
        self._probe: DeviceProbe | None = None
        self._ended_pid = self._starting_pid = 0
        self._starting_since_s = 0.0
        self._was_verified = self._has_served = False
        self._disabled = self._kill_first_pool_process = False
        self._exit_reason = ""
        self._pool: WorkerStatus | None = None
        self._started_at = time.time()
        self._health = DeviceHealth()
        if placement is not None and placement.degraded:
            self._health = self._health.degraded(
                FailureReason.CRASH_LOOP, placement.reason, self._started_at, self._backoff
            )

    @property
    def health(self) -> DeviceHealth:
        """Health of the NPU."""
        return self._health

    def update(self, pool: WorkerStatus | None, now: float, now_s: float) -> None:
        """Process the inputs of this moment.

        Args:
            pool: status file of the pool process; None if it is missing: then the last one holds.
            now: Unix time in seconds.
            now_s: monotonic time in seconds.
        """
        if pool is not None and self._pool is not None and pool.pool_pid != self._pool.pool_pid:
            self.ended_totals.update(self._pool.totals)
        pool = self._pool = pool or self._pool
        if pool is not None:
            self._has_served = self._has_served or pool.state is WorkerState.HEALTHY
            self._exits.update(pool, now_s, ended_pid=self._ended_pid)
            if self._kill_first_pool_process:
                # It was forked for the NPU before the operator's command arrived.
                self._kill_first_pool_process, self.kill_pid = False, pool.pool_pid
            elif pool.pool_pid == self.drain_pid:
                if self._hangs(pool, now_s):
                    self.kill_pid = pool.pool_pid
            elif pool.pool_pid != self._ended_pid:
                self._evaluate(pool, now, now_s)
        self._poll_probe(now, now_s)

    def queues_to_consume(self) -> tuple[Queue, ...]:
        """Return the queues to consume now."""
        if self.drain_pid or self.kill_pid:
            return ()
        return queues_for(
            self.status(), helps=self._settings.cpu_serves_npu_queue, paused=self.paused
        )

    def status(self) -> WorkerStatus:
        """Return the status of the worker: the pool process's, merged with the NPU's health."""
        if self._pool is None:
            return WorkerStatus(self._settings.name, WorkerState.STARTING, self._started_at)
        is_leaving = self._pool.pool_pid in (self.drain_pid, self._ended_pid)
        return merge_status(
            self._pool, self._health, is_leaving=is_leaving, is_disabled=self._disabled
        )

    def final_status(self) -> WorkerStatus | None:
        """Return the last status of a worker that ends with an error it cannot recover from.

        None for a worker that shuts down in order or is about to be restarted.
        """
        if not self.exit_code or self.exit_code == FAILURE:
            return None
        last = replace(without_engine(self.status()), model_info=None, will_retry=False)
        code = last.code if self.exit_code == ENGINE else FailureReason.CRASH_LOOP
        return replace(
            last,
            state=WorkerState.FAILED,
            state_since=time.time(),
            reason=self._exit_reason,
            code=code,
        )

    def replaced(self, pid: int) -> None:
        """Record that the pool process was killed as decided here."""
        self._ended_pid, self.drain_pid, self.kill_pid = pid, 0, 0

    def disable_npu(self, reason: str, now: float) -> None:
        """Apply `degrade`: leave the NPU, or all queues on a worker without one."""
        if self._disabled and self._health.reason == reason:
            return
        self._disabled = True
        self._degrade(OPERATOR, reason, now)

    def enable_npu(self, now: float) -> None:
        """Apply `recover`: probe the NPU now, and use it if the probe passes."""
        self._disabled = False
        if self._health.state is not WorkerState.DEGRADED:
            return
        if self._has_npu:
            self._health = self._health.probe_now(now)
        else:
            self._health = DeviceHealth()
        log.warning("device_recovery_requested worker=%s", self._settings.name)

    def stop(self) -> None:
        """Stop a running probe."""
        if self._probe is not None:
            self._probe.stop()
            self._probe = None

    @property
    def npu_unhealthy(self) -> bool:
        """Whether a requeued batch should go to the CPU queue."""
        return self._has_npu and self._health.state in UNHEALTHY

    @property
    def _has_npu(self) -> bool:
        if self.placement is not None:
            return self.placement.assigned_device is Device.NPU
        return self._pool is not None and self._pool.assigned_device == Device.NPU

    @property
    def _is_settled(self) -> bool:
        """Whether no pool process is starting or being replaced."""
        pool = self._pool
        if pool is None or pool.state is WorkerState.STARTING or pool.pool_pid == self._ended_pid:
            return False
        return not (self.drain_pid or self.kill_pid or self._disabled)

    @property
    def _on_npu(self) -> bool:
        """Whether the present pool process was placed on the NPU."""
        return self._has_npu and not (self.placement is not None and self.placement.degraded)

    def _evaluate(self, pool: WorkerStatus, now: float, now_s: float) -> None:
        if pool.state is WorkerState.FAILED:
            self._init_failed(pool, now)
        elif not self._on_npu:
            if self._exits.is_early_loop:
                self._end(CRASH_LOOP, "its pool process died repeatedly before it was ready")
            elif self._has_npu and pool.state is WorkerState.HEALTHY:
                self.drain_pid = pool.pool_pid  # it opened the NPU before the NPU was degraded
        elif self._disabled and pool.state is not WorkerState.DEGRADED:
            self._degrade(OPERATOR, self._health.reason, now)  # its placement was unknown before
        elif self._exits.is_loop:
            limit, window_s = self._settings.crash_loop_limit, self._settings.crash_loop_window_s
            if self._settings.strict and not self._was_verified:
                self._end(CRASH_LOOP, "its pool process died repeatedly before it was ready")
            else:
                reason = f"The pool process died {limit} times in {window_s:g} s."
                self._degrade(FailureReason.CRASH_LOOP, reason, now)
        elif pool.state is WorkerState.DEGRADED and pool.code:
            self._degrade(pool.code, pool.reason, now)
        elif pool.state is WorkerState.STARTING:
            self._check_start(pool, now, now_s)
        elif self._hangs(pool, now_s):
            self._degrade(
                FailureReason.DEADLINE,
                f"The engine took longer than {self._settings.engine_timeout_s:g} s for a batch.",
                now,
            )
            self.kill_pid = pool.pool_pid
        elif pool.state is WorkerState.HEALTHY:
            self._was_verified = True
            self.inference_s = pool.inference_s or self.inference_s
            if self._health.state is not WorkerState.HEALTHY:
                self._health = self._health.on_verified(now)

    def _hangs(self, pool: WorkerStatus, now_s: float) -> bool:
        return 0 < pool.busy_since < now_s - self._settings.engine_timeout_s

    def _init_failed(self, pool: WorkerStatus, now: float) -> None:
        strict = self._settings.strict and not self._was_verified
        if self._on_npu and not strict:
            self._degrade(pool.code or FailureReason.INIT_FAILED, pool.reason, now)
        else:
            # After it has served once, the supervisor restarts it; otherwise a restart is useless.
            self._end(FAILURE if self._has_served else ENGINE, pool.reason)

    def _check_start(self, pool: WorkerStatus, now: float, now_s: float) -> None:
        limit_s = self._settings.init_timeout_s
        if pool.pool_pid != self._starting_pid:
            # Monotonic: the time of day jumps when it is corrected or a laptop wakes up.
            self._starting_pid, self._starting_since_s = pool.pool_pid, now_s
        if now_s - self._starting_since_s <= limit_s:
            return
        reason = f"Opening the device took longer than {limit_s:g} s."
        if self._settings.strict and not self._was_verified:
            self._end(ENGINE, reason)
        else:
            self._degrade(FailureReason.INIT_TIMEOUT, reason, now)

    def _degrade(self, code: str, reason: str, now: float) -> None:
        before = self._health
        self._health = before.degraded(
            code, reason, now, self._backoff, was_verified=self._was_verified
        )
        if self._health == before:
            return
        log.error(
            "degraded worker=%s code=%s count=%d probe_in_s=%s reason=%s",
            self._settings.name,
            code,
            self._health.failure_count,
            "never"
            if isinf(self._health.next_probe_at)
            else f"{self._health.next_probe_at - now:.1f}",
            reason,
        )
        self.stop()
        if self._on_npu:
            self._exits.reset()  # the next pool processes run on another device
            self.placement = Placement(Device.CPU, Device.NPU, reason)
            self._kill_first_pool_process = self._pool is None
            if self._pool is not None and self._pool.state is WorkerState.STARTING:
                # It may never become ready, and a batch may already be waiting for it.
                self.kill_pid = self._pool.pool_pid
            elif self._pool is not None:
                self.drain_pid = self._pool.pool_pid

    def _poll_probe(self, now: float, now_s: float) -> None:
        if self._probe is None:
            if self._has_npu and self._is_settled and self._health.probe_due(now):
                log.info(
                    "probing worker=%s count=%d", self._settings.name, self._health.failure_count
                )
                self._health = self._health.probing()
                self._probe = self._start_probe(self._settings.init_timeout_s, now_s)
            return
        result = self._probe.poll(now_s)
        if result is not None:
            self._probe = None
            self._finish_probe(result, now)

    def _finish_probe(self, result: ProbeResult, now: float) -> None:
        if not result.passed:
            self._health = self._health.probe_failed(result.code, result.reason, now, self._backoff)
            log.warning(
                "probe_failed worker=%s code=%s count=%d probe_in_s=%.1f reason=%s",
                self._settings.name,
                result.code,
                self._health.failure_count,
                self._health.next_probe_at - now,
                result.reason,
            )
            return
        log.info("probe_passed worker=%s seconds=%.2f", self._settings.name, result.seconds)
        self._health = self._health.on_probe_passed()
        self.placement = self._assigned
        self.drain_pid = self._pool.pool_pid if self._pool else 0

    def _end(self, code: int, reason: str) -> None:
        if not self.exit_code:
            log.error("worker_shutdown worker=%s reason=%s", self._settings.name, reason)
            self.exit_code, self._exit_reason = code, reason


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What bootsteps, tasks and the pool process share: `app.conf.embedq`.

    The pool process inherits it by its fork, so it sees the controller as it was at that moment.
    """

    settings: WorkerSettings
    controller: WorkerController


def merge_status(
    pool: WorkerStatus, health: DeviceHealth, *, is_leaving: bool, is_disabled: bool
) -> WorkerStatus:
    """Merge the status of the pool process with the health of the NPU.

    Args:
        pool: status of the pool process.
        health: of the NPU.
        is_leaving: the pool process was killed or is being drained.
        is_disabled: an operator has disabled the NPU.
    """
    if health.state in UNHEALTHY:
        if pool.state is WorkerState.STARTING or is_leaving:
            pool = without_engine(pool)  # until its replacement is ready
        return replace(
            pool,
            state=health.state,
            code=health.code,
            reason=health.reason,
            state_since=health.state_since,
            failure_count=health.failure_count,
            next_probe_at=0.0 if isinf(health.next_probe_at) else health.next_probe_at,
            will_retry=health.will_retry or is_disabled,
        )
    if is_leaving:
        return replace(without_engine(pool), state=WorkerState.STARTING)
    return replace(pool, failure_count=health.failure_count)


def without_engine(status: WorkerStatus) -> WorkerStatus:
    """Return the status of a worker that computes nothing."""
    return replace(status, device="", engine="", precision="")
