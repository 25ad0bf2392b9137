"""Reroute to the CPU queue; Celery's Request and Task classes.

A batch in hand whose NPU failed under it goes to the CPU queue: same id, no attempt, no failure.

Only from `embed.npu` to `embed.cpu`, so that no batch ever travels in a circle. A strict batch
goes back to its own queue, where another NPU may take it.

A batch as Celery's parent process sees it: in hand, lost with its child, and published again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from celery import Task
from celery.exceptions import Ignore, Reject, WorkerLostError
from celery.worker import state as worker_state
from celery.worker.request import Request

from embedq.protocol.contract import PUBLISHED_HEADER, Queue
from embedq.protocol.message import Header, message_headers
from embedq_worker.main_process.controller import WorkerController
from embedq_worker.main_process.status import COUNTERS

log = logging.getLogger(__name__)


#: Headers of ours, and those of W3C Trace Context.
KEPT: Final = (PUBLISHED_HEADER, "traceparent", "tracestate")


def process_name(worker: str, pid: object) -> str:
    """Name a process of the fleet."""
    return f"{worker}:{pid}"


def can_reroute(queue: str, body: Mapping[str, Any]) -> bool:
    """Tell whether a batch of this queue may be handed to the CPU."""
    return queue == Queue.NPU and not body.get("rerouted")


def kept_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message keeps when it is published again: its age, and whose trace it is in.

    The reconciler takes the head of a queue for its oldest message.
    """
    return {name: headers[name] for name in KEPT if headers.get(name) is not None}


def republish_to_cpu(task: Any, request: Any, body: Mapping[str, Any]) -> None:
    """Publish a batch to the CPU queue under the id that it has.

    Raises:
        Exception: it could not be published; the message in hand is still ours.
    """
    again = task.signature_from_request(
        request,
        args=({**body, "rerouted": True},),
        queue=str(Queue.CPU),
        headers=kept_headers(vars(request)),
    )
    again.apply_async()
    COUNTERS.rerouted += 1


def reroute_or_requeue(task: Any, body: Any, code: str, reason: str) -> NoReturn:
    """Give the batch in hand away, from the process that was to embed it.

    Raises:
        Ignore: it is in the CPU queue; the parent acknowledges the message.
        Reject: it could not be published, or is strict: it goes back to the queue it came from.
    """
    job, index = Header.address(body) or ("", -1)
    queue = (task.request.delivery_info or {}).get("routing_key", "")
    if not can_reroute(queue, body):
        log.warning("batch_requeued job=%s index=%d queue=%s code=%s", job, index, queue, code)
        raise Reject(reason, requeue=True)
    try:
        republish_to_cpu(task, task.request, body)
    except Exception as error:  # whatever it is: the message must stay ours
        log.warning(
            "batch_requeued job=%s index=%d code=%s reason=%s",
            job,
            index,
            code,
            type(error).__name__,
        )
        raise Reject(reason, requeue=True) from None
    log.warning("batch_rerouted job=%s index=%d code=%s reason=%s", job, index, code, reason)
    raise Ignore


#: Header of a message with the process that ended itself over the batch.
CRASHED_PROCESS_HEADER: Final = "died"


#: Signals that come from outside: an operator, the kernel short of memory, a parent that ends.
FROM_OUTSIDE: Final = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


class BatchRequest(Request):
    """A batch in the hand of the parent, which alone sees how its child ended.

    Only the message of the batch travels on. So a batch that comes back because a process ended
    itself names that process; isolation mode knows from its notes which text it was at.
    """

    def info(self, safe: bool = False) -> Any:
        """Describe the batch for `celery inspect` and Flower, without its texts."""
        return super().info(safe=True)

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> None:
        """Hand on the batch of a lost child.

        If the worker gave up its NPU over it, the batch goes to the CPU queue. Otherwise a child
        that ended itself is written down, before Celery publishes the batch again.
        """
        request: Any = self  # celery-types lacks what follows
        headers = kept_headers(request.message.headers)
        request._context.headers = headers
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError) and self._rerouted():
            return
        # billiard tells the status in words only: "signal 11 (SIGSEGV)", "exitcode 70".
        if isinstance(error, WorkerLostError) and not any(s in str(error) for s in FROM_OUTSIDE):
            worker = request.app.conf.embedq.name
            headers[CRASHED_PROCESS_HEADER] = process_name(worker, request.worker_pid)
        super().on_failure(exc_info, *args, **options)

    def _rerouted(self) -> bool:
        """Publish the batch to the CPU queue if its device is to blame, and acknowledge it."""
        request: Any = self  # celery-types lacks what follows
        guard: WorkerController | None = request.app.conf.get("embedq_guard")
        body = request._context.args[0] if request._context.args else None
        queue = (request._context.delivery_info or {}).get("routing_key", "")
        if guard is None or not guard.npu_unhealthy or not isinstance(body, dict):
            return False
        if not can_reroute(queue, body):
            return False
        try:
            republish_to_cpu(request.task, request._context, body)
        except Exception as error:  # whatever it is: Celery's own way is left
            log.warning("batch_not_rerouted reason=%s", type(error).__name__)
            return False
        worker_state.task_ready(self)
        request.acknowledge()
        if address := Header.address(body):
            request.task.backend.undo_attempt(*address)
        health = guard.health
        log.warning(
            "batch_rerouted job=%s index=%s code=%s reason=%s",
            body.get("job"),
            body.get("i"),
            health.code,
            health.reason,
        )
        return True


class BatchTask(Task[..., Any]):
    """A task whose messages look like the SDK's when this worker publishes one again."""

    abstract = True
    Request = "embedq_worker.main_process.rerouting:BatchRequest"

    def apply_async(  # type: ignore[override] # every option of Celery passes through
        self, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Any:
        """Publish a batch, as Celery does when a child was lost under it."""
        if args and isinstance(args[0], Mapping):
            headers = options.get("headers") or {}
            options.update(message_headers(args[0], headers.get(PUBLISHED_HEADER) or time.time()))
            options["headers"] |= headers
        return super().apply_async(args, kwargs, **options)
