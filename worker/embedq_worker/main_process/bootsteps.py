"""Periodic bootsteps of the main process: lease renewal, operator commands, heartbeat, liveness."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from dataclasses import replace
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state
from redis.exceptions import RedisError

from embedq.protocol.worker import WorkerStatus
from embedq.store import fleet
from embedq.store.connection import open_redis
from embedq.store.fleet import DesiredState, OperatorCommand
from embedq_worker.errors import FailureReason
from embedq_worker.main_process import liveness
from embedq_worker.main_process.controller import WorkerContext
from embedq_worker.main_process.status import COUNTERS

log = logging.getLogger(__name__)

#: Interval between two reads of the operator's command, and the pause after a failed one, seconds.
CONTROL_EVERY_S, CONTROL_PAUSE_S = 0.3, 5.0

#: Timeout of one read; the event loop waits for it, seconds.
CONTROL_TIMEOUT_S = 0.5

#: Interval between two checks whether the status has changed, seconds.
STATUS_EVERY_S = 0.2

#: Timeout of publishing a heartbeat; the event loop waits for it, seconds.
HEARTBEAT_TIMEOUT_S = 1.0

#: Interval between two writes of the liveness file, seconds.
LIVENESS_EVERY_S = 1.0


class PeriodicStep(bootsteps.StartStopStep):
    """A step that runs `tick` on the event loop's timer while the broker is connected.

    It starts when the queues can be consumed, and again after each reconnect.

    Attributes:
        every_s: interval between two ticks, seconds.
        context: the worker's settings and controller.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    every_s: float

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self.context: WorkerContext = c.app.conf.embedq
        self._timer: Any = None

    def start(self, c: Any) -> None:
        """Start the timer."""
        self._timer = c.timer.call_repeatedly(self.every_s, self.tick, (c,))

    def stop(self, c: Any) -> None:
        """Cancel the timer; called whenever the broker is lost, and at shutdown."""
        if self._timer is not None:
            self._timer.cancel()

    def tick(self, c: Any) -> None:
        """Do the work once; kombu logs an exception, and the next tick follows all the same."""
        raise NotImplementedError


class LeaseRenewalStep(PeriodicStep):
    """Renew the leases of the batches that this worker holds.

    Kombu redelivers a message that has not been acknowledged within the visibility timeout, even
    if its owner is still computing it. With renewal the timeout can be a minute, so the batch of a
    dead worker is redelivered soon.
    """

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings = self.context.settings
        self.every_s = min(settings.lease_renewal_s, settings.visibility_timeout_s / 4)

    def tick(self, c: Any) -> None:
        """Renew every lease."""
        held = {
            request.message.delivery_tag: time.time()
            for request in worker_state.reserved_requests | worker_state.active_requests
            if not request.acknowledged and request.message.delivery_tag
        }
        if not held:
            return
        channel = c.task_consumer.channel
        try:
            with channel.conn_or_acquire() as client:
                # XX: do not add a message that was acknowledged at this very moment.
                client.zadd(channel.unacked_index_key, held, xx=True)
        except (RedisError, OSError) as error:
            log.warning("lease_renewal_failed held=%d reason=%s", len(held), type(error).__name__)


class ControlStep(PeriodicStep):
    """Poll Redis for the operator's command and apply it.

    A command is a key and not a message, so that it outlasts a restart of the worker until an
    operator replaces it. While Redis is away the last command stays in force.
    """

    every_s = CONTROL_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings = self.context.settings
        self._worker = settings.name
        self._last: OperatorCommand | None = None
        self._has_polled = False
        self._started_at = time.time()
        self._paused_until_s = 0.0
        self._redis = open_redis(
            settings.results_url, connect_timeout_s=CONTROL_TIMEOUT_S, timeout_s=CONTROL_TIMEOUT_S
        )

    def start(self, c: Any) -> None:
        """Poll before the first batch is consumed, then start the timer."""
        self.tick(c)
        super().start(c)

    def tick(self, c: Any) -> None:
        """Poll once, unless Redis failed to answer a moment ago."""
        now_s = time.monotonic()
        if now_s < self._paused_until_s:
            return
        try:
            command, paused = fleet.fetch_commands(self._redis, self._worker)
        except RedisError as error:
            log.debug("control_poll_failed reason=%s", type(error).__name__)
            self._paused_until_s = now_s + CONTROL_PAUSE_S
            return
        controller = self.context.controller
        if controller.paused != paused:
            log.warning("%s worker=%s", "paused" if paused else "resumed", self._worker)
            controller.paused = paused
        first, self._has_polled = not self._has_polled, True
        if command == self._last:
            return
        self._last = command
        if command is not None and command.desired is DesiredState.DEGRADED:
            controller.disable_npu(command.reason, time.time())
        # A `recover` from before this start was for an earlier fault. A later one counts whatever
        # its timestamp: the operator's clock may be slow.
        elif not first or command is None or command.at >= self._started_at:
            controller.enable_npu(time.time())


class HeartbeatStep(PeriodicStep):
    """Publish the heartbeat every `heartbeat_s` seconds and on every change of the status.

    On shutdown the worker is deregistered; if it ends with an error, a last heartbeat with state
    `failed` is published and left to expire.
    """

    every_s = STATUS_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._settings = self.context.settings
        self._published: WorkerStatus | None = None
        self._published_at_s = 0.0
        self._redis = open_redis(
            self._settings.results_url,
            connect_timeout_s=HEARTBEAT_TIMEOUT_S,
            timeout_s=HEARTBEAT_TIMEOUT_S,
        )

    def shutdown(self, c: Any) -> None:
        """Deregister the worker, or publish why it failed."""
        last = self.context.controller.final_status()
        try:
            if last is not None:
                self._publish(last)
            else:
                fleet.deregister(self._redis, self._settings.name)
        except RedisError:
            log.info("deregister_failed worker=%s", self._settings.name)

    def tick(self, c: Any) -> None:
        """Publish if the status has changed or `heartbeat_s` seconds have passed."""
        # Monotonic: an hour's correction of the clock must not stop the heartbeat for an hour.
        now_s = time.monotonic()
        status = self.context.controller.status()
        # Engine calls and counters change with every batch and wait for the next heartbeat.
        shown = replace(status, busy_since=0.0, totals={})
        if shown == self._published and now_s - self._published_at_s < self._settings.heartbeat_s:
            return
        self._published, self._published_at_s = shown, now_s
        try:
            self._publish(status)
        except RedisError as error:
            log.warning("heartbeat_failed reason=%s", type(error).__name__)

    def _publish(self, status: WorkerStatus) -> None:
        totals = Counter(COUNTERS)
        for more in (self.context.controller.ended_totals, status.totals):
            totals.update(more)
        fleet.publish_heartbeat(
            self._redis,
            replace(status, at=time.time(), pid=os.getpid(), totals=dict(totals)),
        )


class LivenessStep(PeriodicStep):
    """Write the liveness file once per second.

    It runs on the event loop, so that a health check sees a loop that hangs.
    """

    every_s = LIVENESS_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._settings = self.context.settings
        self._written_at_s = 0.0
        c.on_broker_wait = self.write_while_waiting

    def tick(self, c: Any) -> None:
        """Write the file."""
        self._write()

    def shutdown(self, c: Any) -> None:
        """Delete the file: a stopped worker must not look like one that hangs."""
        liveness.remove(self._settings.runtime_dir, self._settings.name)

    def write_while_waiting(self) -> None:
        """Write the file while the broker is away and the event loop stands still.

        Kombu calls this many times a second.
        """
        if time.monotonic() - self._written_at_s >= LIVENESS_EVERY_S:
            self._write(connected=False)

    def _write(self, *, connected: bool = True) -> None:
        self._written_at_s = now_s = time.monotonic()
        settings = self._settings
        status = self.context.controller.status()
        started = [request.time_start for request in worker_state.active_requests]
        current = liveness.Liveness(
            worker=settings.name,
            at=now_s,
            pid=os.getpid(),
            pool_pid=status.pool_pid,
            state=str(status.state),
            reason=status.reason,
            # After a crash loop on the NPU, a worker that serves from its CPU is alive.
            crash_loop=status.code == FailureReason.CRASH_LOOP and not status.device,
            connected=connected,
            batch_since=min((at for at in started if at), default=None),
            engine_since=status.busy_since or None,
            engine_timeout_s=settings.engine_timeout_s,
        )
        try:
            liveness.write(settings.runtime_dir, current)
        except OSError as error:
            log.warning("liveness_write_failed worker=%s reason=%s", settings.name, error.strerror)
