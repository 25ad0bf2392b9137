"""The step in a node's parent that writes its heartbeat."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from typing import Any

from redis.exceptions import RedisError

from embedq import fleet
from embedq.redis_client import open_redis
from embedq_worker import tally
from embedq_worker.guard import Guard
from embedq_worker.settings import WorkerSettings
from embedq_worker.state import NodeState
from embedq_worker.ticking import Ticking

log = logging.getLogger("embedq.worker")

#: Seconds between two looks for something new to tell.
LOOK_EVERY_S = 0.2
#: Seconds that a heartbeat may hold up the event loop when Redis does not answer.
HEARTBEAT_TIMEOUT_S = 1.0


class TellFleet(Ticking):
    """Write the node's heartbeat: every few seconds, and at once when its state changes.

    A node that gives up says so with its last one, which fades by itself, as after a crash.
    """

    every_s = LOOK_EVERY_S

    def __init__(self, c: Any, **options: Any) -> None:
        super().__init__(c, **options)
        settings: WorkerSettings = c.app.conf.embedq
        self._settings = settings
        self._told: NodeState | None = None
        self._told_at_s = 0.0
        self._redis = open_redis(
            settings.results_url,
            connect_timeout_s=HEARTBEAT_TIMEOUT_S,
            timeout_s=HEARTBEAT_TIMEOUT_S,
        )

    def shutdown(self, c: Any) -> None:
        """Take leave, so that nobody waits for a node that went in good order."""
        last = c.app.conf.embedq_guard.last_words()
        try:
            if last is not None:
                fleet.beat(self._redis, self._heartbeat(last))
            else:
                fleet.leave(self._redis, self._settings.name)
        except RedisError:
            log.info("leave_not_told node=%s", self._settings.name)

    def tick(self, c: Any) -> None:
        """Tell what is new, or what has not been told for long."""
        guard: Guard = c.app.conf.embedq_guard
        # A clock that is set back by an hour must not silence the node for one.
        now_s = time.monotonic()
        state = guard.shown()
        unchanged = self._told is not None and _same(self._told, state)
        if unchanged and now_s - self._told_at_s < self._settings.heartbeat_s:
            return
        self._told, self._told_at_s = state, now_s
        try:
            fleet.beat(self._redis, self._heartbeat(state))
        except RedisError as error:
            log.warning("heartbeat_not_told reason=%s", type(error).__name__)

    def _heartbeat(self, state: NodeState) -> fleet.Heartbeat:
        return fleet.Heartbeat(
            node=self._settings.name,
            state=str(state.state),
            at=time.time(),
            since=state.since,
            pid=os.getpid(),
            reason=state.reason,
            code=state.code,
            count=state.count,
            probe_at=state.probe_at,
            device=state.device,
            engine=state.engine,
            precision=state.precision,
            card=state.card,
            home=state.home,
            may_return=state.may_return,
            totals=tally.together(self._settings.runtime_dir, self._settings.name),
        )


def _same(one: NodeState, other: NodeState) -> bool:
    """Tell whether two states say the same of a node, however busy it is."""
    return replace(one, busy_since=0.0) == replace(other, busy_since=0.0)
