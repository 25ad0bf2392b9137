"""Celery's Consumer with queue and pool steps.

What the parent of a worker does beside passing batches to its child.

Steps on the event loop's own timer: consume the queues that the worker's state allows and replace a
child that is not to be trusted, miss a child that died; renew the leases of batches in hand, tell
the fleet how the worker is, and hear what an operator wants have files of their own.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery.worker import state as worker_state
from celery.worker.consumer import consumer as celery_consumer

from embedq.protocol.worker import WorkerState
from embedq_worker.main_process.bootsteps import PeriodicStep
from embedq_worker.main_process.controller import WorkerController
from embedq_worker.main_process.status import StatusFile
from embedq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)


#: Seconds between two looks at the state file.
LOOK_EVERY_S = 0.2


#: Seconds between two looks for a dead child.
CHILD_EVERY_S = 0.5


#: What `celery inspect stats` and Flower show of a worker.
SHOWN = (
    "state",
    "reason",
    "code",
    "state_since",
    "failure_count",
    "device",
    "assigned_device",
    "engine",
    "precision",
)


class QueueConsumptionStep(PeriodicStep):
    """Consume what the guard allows, and replace the child that it names."""

    every_s = LOOK_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._file = StatusFile(settings.runtime_dir, settings.name)
        self._guard = WorkerController(settings, c.app.conf.get("embedq_placement"))
        c.app.conf.embedq_guard = self._guard

    def start(self, c: Any) -> None:
        """Apply once before the loop consumes, then keep looking; runs at each reconnect too."""
        # Celery ends the worker when its very first child dies early, and replaces every other. The
        # guard counts them all.
        c.pool.did_start_ok = lambda: True
        self.tick(c)
        super().start(c)

    def stop(self, c: Any) -> None:
        """Stop looking; at the end of the worker a child that is not ready yet need not get
        ready.
        """
        super().stop(c)
        child = self._file.read()
        ends = worker_state.should_stop is not None or worker_state.should_terminate is not None
        if ends and child is not None and child.state is WorkerState.STARTING:
            self._end_child(c, child.pid)

    def shutdown(self, c: Any) -> None:
        """Leave no probe behind."""
        self._guard.stop()

    def info(self, c: Any) -> dict[str, Any]:  # type: ignore[override] # celery-types says None
        """Show the worker's state in `celery inspect stats` and in Flower."""
        state = self._guard.status()
        shown = {key: str(getattr(state, key)) for key in SHOWN}
        return {"embedq": shown, "pool": for_flower(shown, c.pool.info)}

    def tick(self, c: Any) -> None:
        """Look once, and act."""
        guard = self._guard
        guard.update(self._file.read(), time.time(), time.monotonic())
        # The pool may start a child at any moment, for one that died.
        c.app.conf.embedq_placement, c.app.conf.embedq_pace_s = guard.placement, guard.pace_s
        if guard.exit_code:
            worker_state.should_stop = guard.exit_code  # type: ignore[assignment] # an exit status, or None
        wanted = [str(queue) for queue in guard.queues_to_consume()]
        current = {queue.name for queue in c.task_consumer.queues}
        for queue in wanted:
            if queue not in current:
                c.add_task_queue(queue)
        for queue in sorted(current - set(wanted)):
            c.cancel_task_queue(queue)
        holds_none = not (worker_state.reserved_requests or worker_state.active_requests)
        if guard.kill_pid or (guard.drain_pid and holds_none):
            self._end_child(c, guard.kill_pid or guard.drain_pid)

    def _end_child(self, c: Any, pid: int) -> None:
        """End the child, whose driver may hang; the pool starts another where the guard wants."""
        if pid in c.pool.info["processes"]:
            os.kill(pid, signal.SIGKILL)
        self._guard.replaced(pid)


def for_flower(shown: Mapping[str, str], pool: Mapping[str, Any]) -> dict[str, Any]:
    """Put a worker's state before what its pool tells: that is what its page in Flower opens
    with.
    """
    # Without dashes, which Flower takes for blanks.
    since = time.strftime("%d %b %Y %H:%M:%S UTC", time.gmtime(float(shown["state_since"])))
    return {
        **{f"worker {key}": value for key, value in {**shown, "state_since": since}.items()},
        **pool,
    }


class PoolMaintenanceStep(PeriodicStep):
    """Notice a dead child soon.

    Celery wakes up when the child's end of a pipe closes, which is a moment before the process can
    be waited for; when it looks too early, it looks again after five seconds. Half of all killed
    children were replaced that late (measured).
    """

    every_s = CHILD_EVERY_S

    def tick(self, c: Any) -> None:
        """Look once."""
        c.pool.maintain_pool()


class Consumer(celery_consumer.Consumer):
    """Celery's consumer, whose complaints about bad messages quote sizes and never bodies."""

    #: Called about every second while the broker is away; a step sets it.
    on_broker_wait: Callable[[], None] | None = None

    def ensure_connected(self, conn: Any) -> Any:
        """Wait for the broker, showing meanwhile that this worker lives."""
        if self.on_broker_wait is not None:
            # The private one, because an event that cannot be published waits in it too, within
            # the event loop and for as long as the broker is away (measured with kombu 5.7).
            beat = self.on_broker_wait
            conn._ensure_connection = with_callback(conn._ensure_connection, beat)
        return super().ensure_connected(conn)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Drop a message whose body cannot be decoded."""
        self._drop(message, type(exc).__name__)

    def on_unknown_message(self, body: object, message: Any) -> None:
        """Drop a message of no task."""
        self._drop(message, "unknown message")

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:
        """Drop a message of another task."""
        self._drop(message, "unknown task")

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:
        """Drop a message whose headers Celery refuses."""
        self._drop(message, type(exc).__name__)

    def _drop(self, message: Any, reason: str) -> None:
        size = len(message.body or b"")
        log.error("message_refused bytes=%d reason=%s", size, reason)
        message.reject_log_error(log, self.connection_errors)  # type: ignore[attr-defined] # set by Celery


def with_callback(ensure: Callable[..., Any], beat: Callable[[], None]) -> Callable[..., Any]:
    """Return kombu's patient connecting, which beats at each try and every second between."""

    def connect(*args: Any, callback: Callable[[], None] | None = None, **options: Any) -> Any:
        def waiting() -> None:
            beat()
            if callback is not None:
                callback()

        return ensure(*args, callback=waiting, **options)

    return connect
