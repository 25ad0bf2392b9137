"""Open the engine in the pool process and report its status to the main process.

Celery swallows exceptions of `worker_process_init` and would then serve without a model. So nothing
here raises: the result goes into the status file, and the main process consumes no queue until that
says healthy.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from celery import current_app, signals

from embedq.errors import EmbedqError, SettingsError
from embedq.observability import tracing
from embedq.protocol.contract import Device
from embedq.protocol.worker import WorkerState, WorkerStatus
from embedq_worker import process
from embedq_worker.device.placement import DeviceLock, Placement, choose_placement
from embedq_worker.errors import EngineError, FailureReason, describe
from embedq_worker.inference.opener import LOCK_TIMEOUT_S, claim_device, open_placed
from embedq_worker.inference.serving import EngineSet
from embedq_worker.main_process.controller import WorkerContext
from embedq_worker.main_process.device_health import FailureWindow, SlowdownDetector
from embedq_worker.main_process.status import COUNTERS, StatusFile, reset_counters
from embedq_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)

#: Delay before another attempt to write the status file, seconds.
WRITE_RETRY_S = 1.0

#: Period in which failed batches count towards EMBEDQ_INFER_FAILURES, seconds.
INFER_FAILURES_WINDOW_S = 60.0

#: Ratio of a batch's inference time to that of the first batches above which it counts as slow.
SLOWDOWN_FACTOR = 5.0

#: Time that the main process has to kill a pool process whose engine hangs, before that ends
#: itself, seconds.
MAIN_PROCESS_FIRST_S = 5.0

#: Longest time for which one Python thread keeps the others waiting, seconds. With the default of
#: 5 ms the thread that feeds the device waits longer than the device computes.
SWITCH_INTERVAL_S = 0.0005

#: Pause at the start of a pool process whose predecessor died before it was ready, seconds: long
#: enough for the main process to see and count each of them.
EARLY_EXIT_PAUSE_S = 0.5


class PoolProcess:
    """The process of a worker that owns its device, as it reports itself."""

    def __init__(self, settings: WorkerSettings, inference_s: float = 0.0) -> None:
        """Report that this process starts.

        Args:
            settings: of the worker.
            inference_s: normal duration of an NPU inference, as an earlier process measured it;
                0 if unknown.
        """
        self._settings = settings
        self._file = StatusFile(settings.runtime_dir, settings.name)
        self._engines: EngineSet | None = None
        self._on_npu = False
        self._failures = FailureWindow(settings.infer_failures, INFER_FAILURES_WINDOW_S)
        self._slowdown = SlowdownDetector(SLOWDOWN_FACTOR, settings.slow_batches, inference_s)
        before = self._file.read()
        #: Whether the pool process before this one died before it was ready.
        self.follows_early_exit = before is not None and before.state is WorkerState.STARTING
        self.status = WorkerStatus(
            settings.name, WorkerState.STARTING, time.time(), os.getpid(), os.getppid()
        )
        self._is_written = False
        self._write(self.status)

    @property
    def engines(self) -> EngineSet | None:
        """The engines, or None if this process must not serve."""
        return self._engines

    @property
    def on_npu(self) -> bool:
        """Whether the standard engine runs on the NPU, real, emulated or stub."""
        return self._on_npu

    def report_placed(self, placement: Placement) -> None:
        """Report the device on which the engine is about to be opened."""
        self._write(replace(self.status, assigned_device=str(placement.assigned_device)))

    def report_ready(self, engines: EngineSet, placement: Placement) -> None:
        """Report that the engine is open and verified, and start to serve."""
        engine = engines.standard.engine
        self._engines = engines
        self._on_npu = placement.assigned_device is Device.NPU and not placement.degraded
        self.status = replace(
            self.status,
            device=str(engine.device),
            engine=engine.name,
            precision=str(engine.precision),
            model_info=engines.model_info,
        )
        if placement.degraded:
            self._transition(WorkerState.DEGRADED, placement.reason)
        else:
            self._transition(WorkerState.HEALTHY)

    def report_idle(self, reason: str) -> None:
        """Report that this process serves nothing, as the settings ask for."""
        self._transition(WorkerState.DEGRADED, reason)

    def report_failed(self, error: BaseException) -> None:
        """Report why no engine could be opened."""
        code, reason = describe(error, FailureReason.INIT_FAILED)
        self._transition(WorkerState.FAILED, reason, code)

    def record_failure(self, error: Exception) -> tuple[str, str]:
        """Count a failed batch; stop serving if the device has become unhealthy.

        Returns:
            The code and the sentence of the failure.
        """
        code, reason = describe(error, FailureReason.ENGINE_FAILED)
        kind = error.reason if isinstance(error, EngineError) else FailureReason.ENGINE_FAILED
        if self._failures.add(kind, time.monotonic()):
            self.mark_unhealthy(code, reason)
        return code, reason

    def record_duration(self, seconds: float, inferences: int) -> None:
        """Record how long the NPU computed a batch; stop serving if it has become slow.

        The vectors of a slow batch are right and are committed.
        """
        if self._on_npu and inferences and self._slowdown.add(seconds / inferences):
            self.mark_unhealthy(
                FailureReason.SLOW,
                f"Its last {self._settings.slow_batches} batches took over "
                f"{SLOWDOWN_FACTOR:g} times as long as the first ones.",
            )

    def record_totals(self) -> None:
        """Report the counters after a batch."""
        totals = self._engines.totals() if self._engines is not None else {}
        self._write(replace(self.status, totals={**self.status.totals, **totals, **COUNTERS}))

    def mark_unhealthy(self, code: str, reason: str) -> None:
        """Stop serving; the main process replaces this process once it holds no batch."""
        log.error("device_unhealthy worker=%s code=%s reason=%s", self._settings.name, code, reason)
        self._engines = None
        self._transition(WorkerState.DEGRADED, reason, code)

    @contextmanager
    def engine_call(self) -> Iterator[None]:
        """Limit the duration of the body, a call of the engine.

        On an NPU the main process kills this process in time, as the batch is not at fault. If it
        cannot, and on a CPU, where a text may be at fault, this process ends itself.
        """
        self._write(replace(self.status, busy_since=time.monotonic()))
        limit_s = self._settings.engine_timeout_s + (MAIN_PROCESS_FIRST_S if self._on_npu else 0.0)
        try:
            with process.deadline(limit_s):
                yield
        finally:
            normal_s = self._slowdown.normal_s
            self._write(replace(self.status, busy_since=0.0, inference_s=normal_s))

    def write_with_retry(self) -> None:
        """Retry until the status is written: without it the main process consumes nothing."""
        while not self._is_written:
            time.sleep(WRITE_RETRY_S)
            self._write(self.status)

    def close(self) -> None:
        """Close the engines."""
        if self._engines is not None:
            self._engines.close()

    def _transition(self, state: WorkerState, reason: str = "", code: str = "") -> None:
        self._write(
            replace(self.status, state=state, reason=reason, code=code, state_since=time.time())
        )

    def _write(self, status: WorkerStatus) -> None:
        self.status, self._is_written = status, False
        try:
            self._file.write(status)
            self._is_written = True
        except (OSError, SettingsError) as error:
            # Raising would fail a batch, which Celery would then acknowledge: it would be lost.
            log.warning(
                "status_write_failed worker=%s reason=%s", self._settings.name, type(error).__name__
            )


_this: PoolProcess | None = None
_lock: DeviceLock | None = None
_tracer: TracerProvider | None = None


def this_process() -> PoolProcess:
    """Return the pool process that this is.

    Raises:
        RuntimeError: this is another process.
    """
    if _this is None:
        raise RuntimeError("A batch was run outside a pool process. This is a bug.")
    return _this


@signals.worker_process_init.connect
def on_process_init(**_: Any) -> None:
    """Open the engine, or report why it cannot be opened."""
    global _this, _lock
    context: WorkerContext = current_app.conf.embedq
    settings, controller = context.settings, context.controller
    reset_counters()
    this = _this = PoolProcess(settings, controller.inference_s)
    try:
        process.die_with_parent()
        # Ctrl-C in a terminal reaches every process of its group; the main process ends this one.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        process.send_native_to_stderr()
        if settings.traces:
            _enable_tracing()
        if this.follows_early_exit:
            time.sleep(EARLY_EXIT_PAUSE_S)
        began = time.monotonic()
        placement = controller.placement or choose_placement(settings, wait_s=LOCK_TIMEOUT_S)
        this.report_placed(placement)
        if placement.degraded and (settings.strict or not settings.cpu_fallback):
            log.warning("degraded worker=%s device=none reason=%s", settings.name, placement.reason)
            this.report_idle(placement.reason)
            this.write_with_retry()
            return
        _lock = claim_device(settings, placement)
        engines = open_placed(settings, placement)
    except BaseException as error:  # the main process must learn of every kind
        reason = str(error) if isinstance(error, EmbedqError) else type(error).__name__
        log.exception("init_failed worker=%s reason=%s", settings.name, reason)
        this.report_failed(error)
        this.write_with_retry()
        return
    if placement.degraded:
        log.warning("degraded worker=%s device=cpu reason=%s", settings.name, placement.reason)
    this.report_ready(engines, placement)
    this.write_with_retry()
    engine = engines.standard.engine
    log.info(
        "serving worker=%s model=%s identity=%s engine=%s device=%s precision=%s seconds=%.2f",
        settings.name,
        engines.model_info.label,
        engines.model_info.identity[:12],
        engine.name,
        engine.device,
        engine.precision,
        time.monotonic() - began,
    )


@signals.worker_process_shutdown.connect
def on_process_shutdown(**_: Any) -> None:
    """Close the engine, release the device and export the last spans."""
    if _this is not None:
        _this.close()
    if _lock is not None:
        _lock.release()
    if _tracer is not None:
        _tracer.shutdown()


@signals.task_postrun.connect
def on_batch(**_: Any) -> None:
    """Report the counters."""
    this_process().record_totals()


def _enable_tracing() -> None:
    # After the fork, because exporters have threads.
    global _tracer
    _tracer = tracing.enable("embedq-worker")
    from opentelemetry.instrumentation.celery import CeleryInstrumentor

    CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call] # it has no types
