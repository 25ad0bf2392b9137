"""Signs of life: a node's parent writes its pulse, and its child what it has done."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.worker import state as worker_state

from embedq_worker import lifecycle, node_tracing, pulse, tally
from embedq_worker.errors import Reason
from embedq_worker.guard import Guard
from embedq_worker.settings import WorkerSettings
from embedq_worker.ticking import Ticking

log = logging.getLogger("embedq.worker")

#: Seconds between two signs of life.
BEAT_EVERY_S = 1.0


class ShowPulse(Ticking):
    """Write the pulse from the event loop, so that a loop that hangs is seen."""

    every_s = BEAT_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._conf = c.app.conf
        self._settings: WorkerSettings = c.app.conf.embedq
        self._beaten = 0.0
        c.while_waiting_for_broker = self.beat_waiting

    def tick(self, c: Any) -> None:
        """Beat."""
        self._beat()

    def shutdown(self, c: Any) -> None:
        """Leave no file behind that could be taken for a node that hangs."""
        for suffix in (pulse.SUFFIX, tally.SUFFIX):
            path = self._settings.runtime_dir / (self._settings.name + suffix)
            path.unlink(missing_ok=True)

    def beat_waiting(self) -> None:
        """Beat while there is no broker and so no event loop; asked very often at times."""
        if time.monotonic() - self._beaten >= BEAT_EVERY_S:
            self._beat(connected=False)

    def _beat(self, *, connected: bool = True) -> None:
        self._beaten = now_s = time.monotonic()
        settings = self._settings
        guard: Guard = self._conf.embedq_guard
        state = guard.shown()
        began = [request.time_start for request in worker_state.active_requests]
        beat = pulse.Pulse(
            node=settings.name,
            at=now_s,
            pid=os.getpid(),
            child=state.pid,
            state=str(state.state),
            reason=state.reason,
            # A node that goes on with its CPU after such a loop lives.
            crash_loop=state.code == Reason.CRASH_LOOP and not state.device,
            connected=connected,
            batch_since=min((at for at in began if at), default=None),
            engine_since=state.busy_since or None,
            engine_deadline_s=settings.engine_deadline_s,
        )
        try:
            pulse.write(settings.runtime_dir, beat)
        except OSError as error:
            log.warning("pulse_not_written node=%s reason=%s", settings.name, error.strerror)


def beating(ensure: Callable[..., Any], beat: Callable[[], None]) -> Callable[..., Any]:
    """Return kombu's patient connecting, which beats at each try and every second between."""

    def connect(*args: Any, callback: Callable[[], None] | None = None, **options: Any) -> Any:
        def waiting() -> None:
            beat()
            if callback is not None:
                callback()

        return ensure(*args, callback=waiting, **options)

    return connect


@signals.worker_process_init.connect
def on_process_init(**_: Any) -> None:
    """Begin the file of this child."""
    from embedq_worker.app import app  # the app imports the steps of this file

    settings: WorkerSettings = app.conf.embedq
    tally.TALLY.open(settings.runtime_dir, settings.name)
    if settings.traces:
        node_tracing.enable()


@signals.worker_process_shutdown.connect
def on_process_shutdown(**_: Any) -> None:
    """Send the last spans."""
    node_tracing.flush()


@signals.task_postrun.connect
def on_batch(**_: Any) -> None:
    """Write down what this child has done so far."""
    serving = lifecycle.child().serving
    tally.TALLY.write(serving.totals() if serving is not None else {})
