"""Bootsteps: lease renewal, heartbeat, control, liveness.

Work that a worker's parent does again and again beside passing batches on.

The step in a worker's parent that keeps the batches in hand its own.

The step in a worker's parent that hears what an operator wants of it.

The step in a worker's parent that writes its heartbeat.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state
from redis.exceptions import RedisError

from embedq.protocol import worker
from embedq.store import fleet
from embedq.store.connection import open_redis
from embedq.store.fleet import DesiredState, OperatorCommand, fetch_commands
from embedq_worker.errors import FailureReason
from embedq_worker.main_process import liveness, status
from embedq_worker.main_process.controller import WorkerController
from embedq_worker.main_process.status import WorkerStatus
from embedq_worker.settings import WorkerSettings


class PeriodicStep(bootsteps.StartStopStep):
    """A step on the event loop's own timer: ticks while the worker hears its broker.

    It starts once the queues can be consumed, and again after each reconnect.

    Attributes:
        every_s: seconds between two ticks.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    every_s: float

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._timer: Any = None

    def start(self, c: Any) -> None:
        """Tick from now on."""
        self._timer = c.timer.call_repeatedly(self.every_s, self.tick, (c,))

    def stop(self, c: Any) -> None:
        """Stop; runs whenever the broker is lost, and at the end."""
        if self._timer is not None:
            self._timer.cancel()

    def tick(self, c: Any) -> None:
        """Do it once; kombu logs what this raises, and the next tick comes all the same."""
        raise NotImplementedError


log = logging.getLogger(__name__)


class LeaseRenewalStep(PeriodicStep):
    """Keep the batches in hand ours for as long as this parent lives.

    Kombu gives a message to another worker once it has been unacknowledged for the visibility
    timeout, however busy its owner is: without renewal a batch of three timeouts ran three times
    (measured). With it the timeout can be a minute, so a dead worker's batch restarts soon.
    """

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
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
                # XX: a message acknowledged in this very moment must not come back to life.
                client.zadd(channel.unacked_index_key, held, xx=True)
        except (RedisError, OSError) as error:
            log.warning("lease_renewal_failed held=%d reason=%s", len(held), type(error).__name__)


#: Seconds between two questions, and after one that Redis did not answer.
ASK_EVERY_S, REST_S = 0.3, 5.0


#: Seconds that a question may hold up the event loop when Redis does not answer.
TIMEOUT_S = 0.5


class ControlStep(PeriodicStep):
    """Ask the results Redis for standing orders.

    They lie there and not in a message, so that they last over a restart of the worker and of
    Celery until somebody undoes them. While Redis is away, the last that was heard holds.
    """

    every_s = ASK_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._worker = settings.name
        self._last: OperatorCommand | None = None
        self._has_heard = False
        self._began = time.time()
        self._rests_until = 0.0
        self._redis = open_redis(
            settings.results_url, connect_timeout_s=TIMEOUT_S, timeout_s=TIMEOUT_S
        )

    def start(self, c: Any) -> None:
        """Ask before the first batch, and from now on."""
        self.tick(c)
        super().start(c)

    def tick(self, c: Any) -> None:
        """Ask once, unless Redis did not answer just now."""
        now_s = time.monotonic()
        if now_s < self._rests_until:
            return
        try:
            order, paused = fetch_commands(self._redis, self._worker)
        except RedisError as error:
            log.debug("control_poll_failed reason=%s", type(error).__name__)
            self._rests_until = now_s + REST_S
            return
        guard: WorkerController = c.app.conf.embedq_guard
        if guard.paused != paused:
            log.warning("%s worker=%s", "paused" if paused else "resumed", self._worker)
            guard.paused = paused
        first, self._has_heard = not self._has_heard, True
        if order == self._last:
            return
        self._last = order
        if order is not None and order.desired is DesiredState.DEGRADED:
            guard.disable_npu(order.reason, time.time())
        # What stood there before the worker began was for a fault of before. Later ones count,
        # whatever their time: the operator's clock may be behind.
        elif not first or order is None or order.at >= self._began:
            guard.enable_npu(time.time())


#: Seconds between two looks for something new to tell.
LOOK_EVERY_S = 0.2


#: Seconds that a heartbeat may hold up the event loop when Redis does not answer.
HEARTBEAT_TIMEOUT_S = 1.0


class HeartbeatStep(PeriodicStep):
    """Write the worker's heartbeat: every few seconds, and at once when its state changes.

    A worker that gives up says so with its last one, which fades by itself, as after a crash.
    """

    every_s = LOOK_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._settings = settings
        self._told: WorkerStatus | None = None
        self._told_at_s = 0.0
        self._redis = open_redis(
            settings.results_url,
            connect_timeout_s=HEARTBEAT_TIMEOUT_S,
            timeout_s=HEARTBEAT_TIMEOUT_S,
        )

    def shutdown(self, c: Any) -> None:
        """Take leave, so that nobody waits for a worker that went in good order."""
        last = c.app.conf.embedq_guard.final_status()
        try:
            if last is not None:
                fleet.publish_heartbeat(self._redis, self._heartbeat(last))
            else:
                fleet.deregister(self._redis, self._settings.name)
        except RedisError:
            log.info("deregister_failed worker=%s", self._settings.name)

    def tick(self, c: Any) -> None:
        """Tell what is new, or what has not been told for long."""
        guard: WorkerController = c.app.conf.embedq_guard
        # A clock that is set back by an hour must not silence the worker for one.
        now_s = time.monotonic()
        state = guard.status()
        unchanged = self._told is not None and _same(self._told, state)
        if unchanged and now_s - self._told_at_s < self._settings.heartbeat_s:
            return
        self._told, self._told_at_s = state, now_s
        try:
            fleet.publish_heartbeat(self._redis, self._heartbeat(state))
        except RedisError as error:
            log.warning("heartbeat_failed reason=%s", type(error).__name__)

    def _heartbeat(self, state: WorkerStatus) -> worker.Heartbeat:
        return worker.Heartbeat(
            worker=self._settings.name,
            state=str(state.state),
            at=time.time(),
            state_since=state.state_since,
            pid=os.getpid(),
            reason=state.reason,
            code=state.code,
            failure_count=state.failure_count,
            next_probe_at=state.next_probe_at,
            device=state.device,
            engine=state.engine,
            precision=state.precision,
            model_info=state.model_info,
            assigned_device=state.assigned_device,
            will_retry=state.will_retry,
            totals=status.read_totals(self._settings.runtime_dir, self._settings.name),
        )


def _same(one: WorkerStatus, other: WorkerStatus) -> bool:
    """Tell whether two states say the same of a worker, however busy it is."""
    return replace(one, busy_since=0.0) == replace(other, busy_since=0.0)


#: Seconds between two signs of life.
BEAT_EVERY_S = 1.0


class LivenessStep(PeriodicStep):
    """Write the pulse from the event loop, so that a loop that hangs is seen."""

    every_s = BEAT_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._conf = c.app.conf
        self._settings: WorkerSettings = c.app.conf.embedq
        self._beaten = 0.0
        c.on_broker_wait = self.beat_waiting

    def tick(self, c: Any) -> None:
        """Beat."""
        self._beat()

    def shutdown(self, c: Any) -> None:
        """Leave no file behind that could be taken for a worker that hangs."""
        for suffix in (liveness.SUFFIX, status.SUFFIX):
            path = self._settings.runtime_dir / (self._settings.name + suffix)
            path.unlink(missing_ok=True)

    def beat_waiting(self) -> None:
        """Beat while there is no broker and so no event loop; asked very often at times."""
        if time.monotonic() - self._beaten >= BEAT_EVERY_S:
            self._beat(connected=False)

    def _beat(self, *, connected: bool = True) -> None:
        self._beaten = now_s = time.monotonic()
        settings = self._settings
        guard: WorkerController = self._conf.embedq_guard
        state = guard.status()
        began = [request.time_start for request in worker_state.active_requests]
        beat = liveness.Liveness(
            worker=settings.name,
            at=now_s,
            pid=os.getpid(),
            child=state.pid,
            state=str(state.state),
            reason=state.reason,
            # A worker that goes on with its CPU after such a loop lives.
            crash_loop=state.code == FailureReason.CRASH_LOOP and not state.device,
            connected=connected,
            batch_since=min((at for at in began if at), default=None),
            engine_since=state.busy_since or None,
            engine_timeout_s=settings.engine_timeout_s,
        )
        try:
            liveness.write(settings.runtime_dir, beat)
        except OSError as error:
            log.warning("liveness_write_failed worker=%s reason=%s", settings.name, error.strerror)
