"""Open the engine in the pool process and report its state.

What the child of a worker says of itself, and when it stops trusting its device.

The child tells through the worker's state file; what follows from it, the parent decides.

Tracing of a worker's child, by the official instrumentation of Celery.

The life of a worker's child: find the model, open the engine, prove it, serve.

Runs in Celery's `worker_process_init`, whose exceptions Celery swallows and then serves without a
model. So nothing here raises: the child writes what became of it into the worker's state file, and
the parent consumes nothing until that says healthy.

Signs of life: a worker's parent writes its pulse, and its child what it has done.
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

from celery import signals

from embedq.errors import EmbedqError, SettingsError
from embedq.observability import tracing
from embedq.protocol.contract import Device
from embedq.protocol.worker import WorkerState
from embedq_worker import process
from embedq_worker.device.placement import DeviceLock, Placement, choose_placement
from embedq_worker.errors import EngineError, FailureReason, describe
from embedq_worker.inference.opener import LOCK_TIMEOUT_S, claim_device, open_placed
from embedq_worker.inference.serving import EngineSet
from embedq_worker.main_process import status
from embedq_worker.main_process.device_health import FailureWindow, SlowdownDetector
from embedq_worker.main_process.status import StatusFile, WorkerStatus
from embedq_worker.process import die_with_parent
from embedq_worker.settings import WorkerSettings

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger(__name__)


#: Seconds after which a child that could not tell how it is tries again.
TELL_AGAIN_S = 1.0


#: Period in which failed batches count towards EMBEDQ_INFER_FAILURES, seconds.
INFER_FAILURES_WINDOW_S = 60.0


#: Ratio of a batch's inference time to that of the first batches above which it counts as slow.
SLOWDOWN_FACTOR = 5.0


#: Seconds that the parent has to end a child whose engine hangs, before the child ends itself.
PARENT_FIRST_S = 5.0


class Child:
    """The process of a worker that owns its device."""

    def __init__(self, settings: WorkerSettings, pace_s: float = 0.0) -> None:
        """Begin as a child that starts.

        Args:
            settings: of the worker.
            pace_s: what an inference took the child before this one; 0 if nobody knows.
        """
        self._settings = settings
        self._file = StatusFile(settings.runtime_dir, settings.name)
        self._serving: EngineSet | None = None
        self._on_npu = False
        self._failures = FailureWindow(settings.infer_failures, INFER_FAILURES_WINDOW_S)
        self._pace = SlowdownDetector(SLOWDOWN_FACTOR, settings.slow_batches, pace_s)
        before = self._file.read()
        #: Whether the child before this one died before it was ready.
        self.follows_early_death = before is not None and before.state is WorkerState.STARTING
        self.state = WorkerStatus(WorkerState.STARTING, time.time(), os.getpid())
        self._written = False
        self._write(self.state)

    @property
    def engines(self) -> EngineSet | None:
        """What this child embeds with, or None if it may not serve."""
        return self._serving

    @property
    def on_npu(self) -> bool:
        """Whether what it embeds with is the NPU of the worker, or plays it."""
        return self._on_npu

    def report_placed(self, placement: Placement) -> None:
        """Say where this child is about to open its engine."""
        self._write(replace(self.state, assigned_device=str(placement.assigned_device)))

    def report_ready(self, serving: EngineSet, placement: Placement) -> None:
        """Say that the engine is open and proven."""
        engine = serving.standard.engine
        self._serving = serving
        self._on_npu = placement.assigned_device is Device.NPU and not placement.degraded
        state = replace(
            self.state,
            device=str(engine.device),
            engine=engine.name,
            precision=str(engine.precision),
            model_info=serving.model_info,
        )
        if placement.degraded:
            self._write(state.transition(WorkerState.DEGRADED, placement.reason))
        else:
            self._write(state.transition(WorkerState.HEALTHY))

    def report_idle(self, reason: str) -> None:
        """Say that there is nothing to serve with, and that this is meant to be."""
        self._write(self.state.transition(WorkerState.DEGRADED, reason))

    def report_failed(self, error: BaseException) -> None:
        """Say why no engine could be opened."""
        code, reason = describe(error, FailureReason.INIT_FAILED)
        self._write(self.state.transition(WorkerState.FAILED, reason, code))

    def record_failure(self, error: Exception) -> tuple[str, str]:
        """Weigh a failed batch, and stop serving if the device has lost its trust.

        Returns:
            The code and the sentence of the failure.
        """
        code, reason = describe(error, FailureReason.ENGINE_FAILED)
        kind = error.reason if isinstance(error, EngineError) else FailureReason.ENGINE_FAILED
        if self._failures.are_too_many(kind, time.monotonic()):
            self.mark_unhealthy(code, reason)
        return code, reason

    def record_duration(self, seconds: float, inferences: int) -> None:
        """Take note of how long a batch kept the NPU; a slow one's vectors are right all the same.

        Args:
            seconds: in which the device computed for it.
            inferences: in it.
        """
        if self._on_npu and inferences and self._pace.is_slow(seconds / inferences):
            self.mark_unhealthy(
                FailureReason.SLOW,
                f"Its last {self._settings.slow_batches} batches took over "
                f"{SLOWDOWN_FACTOR:g} times as long as the first ones.",
            )

    def mark_unhealthy(self, code: str, reason: str) -> None:
        """Stop serving; the parent replaces this process once it has let go of its batch."""
        log.error("device_unhealthy worker=%s code=%s reason=%s", self._settings.name, code, reason)
        self._serving = None
        self._write(self.state.transition(WorkerState.DEGRADED, reason, code))

    @contextmanager
    def engine_call(self) -> Iterator[None]:
        """Let nobody wait for ever for the body, a call of the engine.

        On an NPU the parent ends this process in time, for the batch is not to blame. The process
        ends itself where the parent cannot, and on a CPU, where a text may well be.
        """
        self._write(replace(self.state, busy_since=time.monotonic()))
        limit_s = self._settings.engine_timeout_s + (PARENT_FIRST_S if self._on_npu else 0.0)
        try:
            with process.deadline(limit_s):
                yield
        finally:
            self._write(replace(self.state, busy_since=0.0, pace_s=self._pace.known_s))

    def write_with_retry(self) -> None:
        """Tell again until it is written: nothing else would, and the parent consumes nothing."""
        while not self._written:
            time.sleep(TELL_AGAIN_S)
            self._write(self.state)

    def close(self) -> None:
        """Give the devices back."""
        if self._serving is not None:
            self._serving.close()

    def _write(self, state: WorkerStatus) -> None:
        self.state, self._written = state, False
        try:
            self._file.write(state)
            self._written = True
        except (OSError, SettingsError) as error:
            # A full disk must not fail a batch: Celery would acknowledge it, and it would be gone.
            log.warning(
                "status_write_failed worker=%s reason=%s", self._settings.name, type(error).__name__
            )


_provider: TracerProvider | None = None


def enable() -> None:
    """Trace each batch of this child; called after the fork, because exporters have threads.

    Raises:
        SettingsError: OpenTelemetry is missing, or its exporter unknown.
    """
    global _provider
    _provider = tracing.enable("embedq-worker")
    from opentelemetry.instrumentation.celery import CeleryInstrumentor

    CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call] # it has no types


def flush() -> None:
    """Send what is left."""
    if _provider is not None:
        _provider.shutdown()


#: Seconds for which one Python thread may keep the others from running. With the default of 5 ms a
#: thread that hands the device its next work waits longer for its turn than the device computes.
SWITCH_INTERVAL_S = 0.0005


#: Seconds that a child waits whose predecessor died before it was ready: long enough for the parent
#: to see each of them, so that a loop ends after about as many as it should; 13 were seen for 5.
EARLY_DEATH_PAUSE_S = 0.5


_child: Child | None = None


_claim: DeviceLock | None = None


def current_child() -> Child:
    """Return what this process says of itself.

    Raises:
        RuntimeError: it is no child of a worker.
    """
    if _child is None:
        raise RuntimeError("A batch outside a worker's child. This is a bug.")
    return _child


@signals.worker_process_init.connect
def on_process_init(sender: Any = None, **_: Any) -> None:
    """Make this child ready to serve, or record why it is not."""
    global _child, _claim
    from embedq_worker.main_process.app import (
        app,  # the app imports the tasks, which import this file
    )

    settings: WorkerSettings = app.conf.embedq
    _child = Child(settings, app.conf.get("embedq_pace_s", 0.0))
    try:
        die_with_parent()
        # Ctrl-C in a terminal reaches the whole group; the parent decides when a child ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        process.send_native_to_stderr()
        if _child.follows_early_death:
            time.sleep(EARLY_DEATH_PAUSE_S)
        began = time.monotonic()
        placement = app.conf.get("embedq_placement") or choose_placement(
            settings, wait_s=LOCK_TIMEOUT_S
        )
        _child.report_placed(placement)
        if placement.degraded and (settings.strict or not settings.cpu_fallback):
            log.warning("degraded worker=%s device=none reason=%s", settings.name, placement.reason)
            _child.report_idle(placement.reason)
            _child.write_with_retry()
            return
        _claim = claim_device(settings, placement)
        opened = open_placed(settings, placement)
    except BaseException as error:  # whatever it is, the parent must hear of it
        reason = str(error) if isinstance(error, EmbedqError) else type(error).__name__
        log.exception("init_failed worker=%s reason=%s", settings.name, reason)
        _child.report_failed(error)
        _child.write_with_retry()
        return
    if placement.degraded:
        log.warning("degraded worker=%s device=cpu reason=%s", settings.name, placement.reason)
    _child.report_ready(opened, placement)
    _child.write_with_retry()
    engine = opened.standard.engine
    log.info(
        "serving worker=%s model=%s identity=%s engine=%s device=%s precision=%s seconds=%.2f",
        settings.name,
        opened.model_info.label,
        opened.model_info.identity[:12],
        engine.name,
        engine.device,
        engine.precision,
        time.monotonic() - began,
    )


@signals.worker_process_shutdown.connect
def on_process_shutdown(**_: Any) -> None:
    """Give the device back when the child ends in good order."""
    if _child is not None:
        _child.close()
    if _claim is not None:
        _claim.release()


@signals.worker_process_init.connect
def open_counters(**_: Any) -> None:
    """Begin the file of this child."""
    from embedq_worker.main_process.app import app  # the app imports the steps of this file

    settings: WorkerSettings = app.conf.embedq
    status.COUNTERS.open(settings.runtime_dir, settings.name)
    if settings.traces:
        enable()


@signals.worker_process_shutdown.connect
def flush_spans(**_: Any) -> None:
    """Send the last spans."""
    flush()


@signals.task_postrun.connect
def on_batch(**_: Any) -> None:
    """Write down what this child has done so far."""
    serving = current_child().engines
    status.COUNTERS.write(serving.totals() if serving is not None else {})
