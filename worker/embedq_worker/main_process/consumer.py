"""Celery's consumer of the main process, with the steps that manage queues and pool process."""

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
from embedq_worker.main_process.bootsteps import STATUS_EVERY_S, PeriodicStep
from embedq_worker.main_process.status import StatusFile

log = logging.getLogger(__name__)

#: Interval between two searches for a dead pool process, seconds.
MAINTAIN_EVERY_S = 0.5

#: Fields of the status that `celery inspect stats` and Flower show.
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
    """Apply the controller's decisions: consume its queues and replace the pool process."""

    every_s = STATUS_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings = self.context.settings
        self._file = StatusFile(settings.runtime_dir, settings.name)

    def start(self, c: Any) -> None:
        """Apply the decisions before anything is consumed, then start the timer."""
        # Celery ends the worker when its first pool process dies early, and replaces later ones.
        # Here the controller counts them all.
        c.pool.did_start_ok = lambda: True
        self.tick(c)
        super().start(c)

    def stop(self, c: Any) -> None:
        """Cancel the timer; at shutdown, kill a pool process that is not ready yet."""
        super().stop(c)
        pool = self._file.read()
        ends = worker_state.should_stop is not None or worker_state.should_terminate is not None
        if ends and pool is not None and pool.state is WorkerState.STARTING:
            self._kill(c, pool.pool_pid)

    def shutdown(self, c: Any) -> None:
        """Stop a running probe."""
        self.context.controller.stop()

    def info(self, c: Any) -> dict[str, Any]:  # type: ignore[override] # celery-types says None
        """Return the worker's status for `celery inspect stats` and Flower."""
        status = self.context.controller.status()
        shown = {key: str(getattr(status, key)) for key in SHOWN}
        return {"embedq": shown, "pool": for_flower(shown, c.pool.info)}

    def tick(self, c: Any) -> None:
        """Update the controller and apply its decisions."""
        controller = self.context.controller
        controller.update(self._file.read(), time.time(), time.monotonic())
        if controller.exit_code:
            worker_state.should_stop = controller.exit_code  # type: ignore[assignment] # an exit status, or None
        wanted = [str(queue) for queue in controller.queues_to_consume()]
        current = {queue.name for queue in c.task_consumer.queues}
        for queue in wanted:
            if queue not in current:
                c.add_task_queue(queue)
        for queue in sorted(current - set(wanted)):
            c.cancel_task_queue(queue)
        holds_batch = bool(worker_state.reserved_requests or worker_state.active_requests)
        if controller.kill_pid or (controller.drain_pid and not holds_batch):
            self._kill(c, controller.kill_pid or controller.drain_pid)

    def _kill(self, c: Any, pid: int) -> None:
        # SIGKILL, as a driver may hang. Celery's pool starts a replacement.
        if pid in c.pool.info["processes"]:
            os.kill(pid, signal.SIGKILL)
        self.context.controller.replaced(pid)


def for_flower(shown: Mapping[str, str], pool: Mapping[str, Any]) -> dict[str, Any]:
    """Put the worker's status before the pool's statistics, which Flower shows first."""
    # Flower replaces dashes by blanks, so the date has none.
    since = time.strftime("%d %b %Y %H:%M:%S UTC", time.gmtime(float(shown["state_since"])))
    return {
        **{f"worker {key}": value for key, value in {**shown, "state_since": since}.items()},
        **pool,
    }


class PoolMaintenanceStep(PeriodicStep):
    """Let Celery's pool search for a dead pool process twice a second.

    Celery searches when the pipe of a pool process closes, which is a moment before the process can
    be waited for, and again only after five seconds.
    """

    every_s = MAINTAIN_EVERY_S

    def tick(self, c: Any) -> None:
        """Search once."""
        c.pool.maintain_pool()


class Consumer(celery_consumer.Consumer):
    """Celery's consumer; it logs the size of an invalid message and never its body."""

    #: Called about once per second while the broker is away; set by LivenessStep.
    on_broker_wait: Callable[[], None] | None = None

    def ensure_connected(self, conn: Any) -> Any:
        """Wait for the broker and call `on_broker_wait` meanwhile."""
        if self.on_broker_wait is not None:
            # The private method: publishing an event calls it too, inside the event loop, and
            # waits there for as long as the broker is away.
            conn._ensure_connection = with_callback(conn._ensure_connection, self.on_broker_wait)
        return super().ensure_connected(conn)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Reject a message whose body cannot be decoded."""
        self._reject(message, type(exc).__name__)

    def on_unknown_message(self, body: object, message: Any) -> None:
        """Reject a message that names no task."""
        self._reject(message, "unknown message")

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:
        """Reject a message of another task."""
        self._reject(message, "unknown task")

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:
        """Reject a message whose headers Celery refuses."""
        self._reject(message, type(exc).__name__)

    def _reject(self, message: Any, reason: str) -> None:
        size = len(message.body or b"")
        log.error("message_refused bytes=%d reason=%s", size, reason)
        message.reject_log_error(log, self.connection_errors)  # type: ignore[attr-defined] # set by Celery


def with_callback(ensure: Callable[..., Any], on_wait: Callable[[], None]) -> Callable[..., Any]:
    """Wrap kombu's `_ensure_connection` to call `on_wait` at each attempt and while it sleeps."""

    def connect(*args: Any, callback: Callable[[], None] | None = None, **options: Any) -> Any:
        def waiting() -> None:
            on_wait()
            if callback is not None:
                callback()

        return ensure(*args, callback=waiting, **options)

    return connect
