"""What the parent of a node does beside passing batches to its child.

Four steps on the event loop's own timer: consume the queues that the node's state allows, renew
the leases of batches in hand, miss a child that died, and tell the fleet how the node is.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery import bootsteps
from celery.worker import state as worker_state
from celery.worker.consumer import consumer as celery_consumer
from redis.exceptions import RedisError

from embedq import fleet
from embedq.redis_client import open_redis
from embedq_worker import tally
from embedq_worker.exits import CRASH_LOOP, ENGINE
from embedq_worker.health import EarlyDeaths, queues_for
from embedq_worker.settings import WorkerSettings
from embedq_worker.state import NodeState, State, StateFile
from embedq_worker.vitals import ShowPulse, beating

log = logging.getLogger("embedq.worker")

#: Seconds between two looks at the state file.
LOOK_EVERY_S = 0.1
#: Seconds between two looks for a dead child.
CHILD_EVERY_S = 0.5
#: Seconds that a heartbeat may hold up the event loop when Redis does not answer.
HEARTBEAT_TIMEOUT_S = 1.0


class ServeQueues(bootsteps.StartStopStep):
    """Consume what the node's state allows; nothing while its child is not ready."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._helps = settings.help_npu
        self._early = EarlyDeaths()
        self._file = StateFile(settings.runtime_dir, settings.name)
        self._timer: Any = None

    def start(self, c: Any) -> None:
        """Apply once before the loop consumes, then keep looking; runs at each reconnect too."""
        self._apply(c)
        self._timer = c.timer.call_repeatedly(LOOK_EVERY_S, self._apply, (c,))

    def stop(self, c: Any) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()

    def info(self, c: Any) -> dict[str, Any]:  # type: ignore[override] # celery-types says None
        """Show the node's state in `celery inspect stats` and in Flower."""
        state = self._file.read()
        if state is None:
            return {"embedq": {"state": str(State.STARTING)}}
        keys = ("state", "reason", "since", "device", "home", "engine", "precision")
        shown = {key: str(getattr(state, key)) for key in keys}
        return {"embedq": shown, "pool": for_flower(shown, c.pool.info)}

    def _apply(self, c: Any) -> None:
        state = self._file.read()
        if state is not None and state.state is State.FAILED:
            log.error("node_ends reason=%s", state.reason)
            worker_state.should_stop = ENGINE  # type: ignore[assignment] # an exit status, or None
        if self._early.is_loop(state, time.monotonic()):
            log.error("node_ends reason=its child died again and again before it was ready")
            worker_state.should_stop = CRASH_LOOP  # type: ignore[assignment] # as above
        wanted = [str(queue) for queue in queues_for(state, helps=self._helps)]
        current = {queue.name for queue in c.task_consumer.queues}
        for queue in wanted:
            if queue not in current:
                c.add_task_queue(queue)
        for queue in sorted(current - set(wanted)):
            c.cancel_task_queue(queue)


def for_flower(shown: Mapping[str, str], pool: Mapping[str, Any]) -> dict[str, Any]:
    """Put a node's state before what its pool tells: that is what its page in Flower opens with."""
    # Without dashes, which Flower takes for blanks.
    since = time.strftime("%d %b %Y %H:%M:%S UTC", time.gmtime(float(shown["since"])))
    return {**{f"node {key}": value for key, value in {**shown, "since": since}.items()}, **pool}


class RenewLeases(bootsteps.StartStopStep):
    """Keep the batches in hand ours for as long as this parent lives.

    Kombu gives a message to another node once it has been unacknowledged for the visibility
    timeout, however busy its owner is: without renewal a batch of three timeouts ran three times
    (measured). With it the timeout can be a minute, so a dead node's batch restarts soon.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._every_s = min(settings.lease_renewal_s, settings.visibility_timeout_s / 4)
        self._timer: Any = None

    def start(self, c: Any) -> None:
        """Renew from now on."""
        self._timer = c.timer.call_repeatedly(self._every_s, self._renew, (c,))

    def stop(self, c: Any) -> None:
        """Stop renewing."""
        if self._timer is not None:
            self._timer.cancel()

    def _renew(self, c: Any) -> None:
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
            log.warning("lease_not_renewed held=%d reason=%s", len(held), type(error).__name__)


class MissChild(bootsteps.StartStopStep):
    """Notice a dead child soon.

    Celery wakes up when the child's end of a pipe closes, which is a moment before the process can
    be waited for; when it looks too early, it looks again after five seconds. Half of all killed
    children were replaced that late (measured).
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        self._timer: Any = None

    def start(self, c: Any) -> None:
        """Look from now on."""
        self._timer = c.timer.call_repeatedly(CHILD_EVERY_S, c.pool.maintain_pool)

    def stop(self, c: Any) -> None:
        """Stop looking."""
        if self._timer is not None:
            self._timer.cancel()


class TellFleet(bootsteps.StartStopStep):
    """Write the node's heartbeat."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._settings = settings
        self._file = StateFile(settings.runtime_dir, settings.name)
        self._told: NodeState | None = None
        self._told_at = 0.0
        self._timer: Any = None
        self._redis = open_redis(
            settings.results_url,
            connect_timeout_s=HEARTBEAT_TIMEOUT_S,
            timeout_s=HEARTBEAT_TIMEOUT_S,
        )

    def start(self, c: Any) -> None:
        """Tell from now on: every few seconds, and at once when the state changes."""
        self._timer = c.timer.call_repeatedly(LOOK_EVERY_S, self._tell)

    def stop(self, c: Any) -> None:
        """Stop telling; the last heartbeat fades by itself, as after a crash."""
        if self._timer is not None:
            self._timer.cancel()

    def shutdown(self, c: Any) -> None:
        """Take leave, so that nobody waits for a node that went in good order."""
        try:
            fleet.leave(self._redis, self._settings.name)
        except RedisError:
            log.info("leave_not_told node=%s", self._settings.name)

    def _tell(self) -> None:
        state = self._file.read() or NodeState(State.STARTING, time.time(), 0)
        now = time.time()
        unchanged = self._told is not None and self._told.since == state.since
        if unchanged and now - self._told_at < self._settings.heartbeat_s:
            return
        self._told, self._told_at = state, now
        heartbeat = fleet.Heartbeat(
            node=self._settings.name,
            state=str(state.state),
            at=now,
            since=state.since,
            pid=os.getpid(),
            reason=state.reason,
            device=state.device,
            engine=state.engine,
            precision=state.precision,
            card=state.card,
            home=state.home,
            may_return=state.may_return,
            totals=tally.read(self._settings.runtime_dir, self._settings.name).totals,
        )
        try:
            fleet.beat(self._redis, heartbeat)
        except RedisError as error:
            log.warning("heartbeat_not_told reason=%s", type(error).__name__)


class Consumer(celery_consumer.Consumer):
    """Celery's consumer, whose complaints about bad messages quote sizes and never bodies."""

    #: Called about every second while the broker is away; a step sets it.
    while_waiting_for_broker: Callable[[], None] | None = None

    def ensure_connected(self, conn: Any) -> Any:
        """Wait for the broker, showing meanwhile that this node lives."""
        if self.while_waiting_for_broker is not None:
            conn.ensure_connection = beating(conn.ensure_connection, self.while_waiting_for_broker)
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


def add_steps(app: Any) -> None:
    """Add the steps to an app."""
    app.steps["consumer"].update((ServeQueues, RenewLeases, MissChild, TellFleet, ShowPulse))
