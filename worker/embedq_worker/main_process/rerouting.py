"""Reroute batches to the CPU queue, from the pool process or when it died.

A batch whose NPU failed is published to `embed.cpu` with its id; neither an attempt nor a failure
is counted. Batches are rerouted from `embed.npu` only, so none can travel in a circle. A strict
batch is requeued to its own queue, which another NPU may consume.
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
from embedq_worker.main_process.controller import WorkerContext
from embedq_worker.main_process.status import COUNTERS

log = logging.getLogger(__name__)

#: Headers that a republished message keeps: when it was first published, and W3C Trace Context.
KEPT_HEADERS: Final = (PUBLISHED_HEADER, "traceparent", "tracestate")


def process_name(worker: str, pid: object) -> str:
    """Return the name of a pool process in the ledger."""
    return f"{worker}:{pid}"


def can_reroute(queue: str, body: Mapping[str, Any]) -> bool:
    """Return whether a batch of this queue may be moved to the CPU queue."""
    return queue == Queue.NPU and not body.get("rerouted")


def kept_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the headers that a message keeps when it is published again.

    Recovery of lost batches relies on the age of the message at the head of a queue.
    """
    return {name: headers[name] for name in KEPT_HEADERS if headers.get(name) is not None}


def republish_to_cpu(task: Any, request: Any, body: Mapping[str, Any]) -> None:
    """Publish a batch to the CPU queue with its task id.

    Raises:
        Exception: publishing failed; the caller still holds the message.
    """
    again = task.signature_from_request(
        request,
        args=({**body, "rerouted": True},),
        queue=str(Queue.CPU),
        headers=kept_headers(vars(request)),
    )
    again.apply_async()
    COUNTERS["rerouted"] += 1


def reroute_or_requeue(task: Any, body: Any, code: str, reason: str) -> NoReturn:
    """Reroute the batch of the running task, or requeue it where that is not possible.

    Raises:
        Ignore: it was published to the CPU queue; the main process acknowledges the message.
        Reject: it is strict or publishing failed: it is requeued.
    """
    job, index = Header.address(body) or ("", -1)
    queue = (task.request.delivery_info or {}).get("routing_key", "")
    if not can_reroute(queue, body):
        log.warning("batch_requeued job=%s index=%d queue=%s code=%s", job, index, queue, code)
        raise Reject(reason, requeue=True)
    try:
        republish_to_cpu(task, task.request, body)
    except Exception as error:  # any kind: acknowledging the message would lose the batch
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


#: Header with the name of the pool process that crashed while it computed the batch.
CRASHED_PROCESS_HEADER: Final = "died"

#: Signals sent by an operator, the kernel's OOM killer or a main process that ends.
EXTERNAL_SIGNALS: Final = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")


class BatchRequest(Request):
    """A batch that the main process holds while the pool process computes it.

    Only the main process sees how a pool process ended. It writes the name of a crashed one into
    the headers; isolation mode looks up which text that process was computing.
    """

    def info(self, safe: bool = False) -> Any:
        """Return the batch for `celery inspect` and Flower, without its texts."""
        return super().info(safe=True)

    def on_failure(self, exc_info: Any, *args: Any, **options: Any) -> None:
        """Publish the batch of a pool process that died.

        If the NPU is unhealthy, the batch goes to the CPU queue. Otherwise Celery publishes it
        again, with the name of the process if that crashed.
        """
        request: Any = self  # celery-types lacks what follows
        headers = kept_headers(request.message.headers)
        request._context.headers = headers
        error = getattr(exc_info.exception, "exc", exc_info.exception)
        if isinstance(error, WorkerLostError) and self._rerouted():
            return
        # billiard gives the status in words only: "signal 11 (SIGSEGV)", "exitcode 70".
        is_external = any(signal in str(error) for signal in EXTERNAL_SIGNALS)
        if isinstance(error, WorkerLostError) and not is_external:
            worker = request.app.conf.embedq.settings.name
            headers[CRASHED_PROCESS_HEADER] = process_name(worker, request.worker_pid)
        super().on_failure(exc_info, *args, **options)

    def _rerouted(self) -> bool:
        request: Any = self  # celery-types lacks what follows
        context: WorkerContext = request.app.conf.embedq
        body = request._context.args[0] if request._context.args else None
        queue = (request._context.delivery_info or {}).get("routing_key", "")
        if not context.controller.npu_unhealthy or not isinstance(body, dict):
            return False
        if not can_reroute(queue, body):
            return False
        try:
            republish_to_cpu(request.task, request._context, body)
        except Exception as error:  # any kind: Celery then publishes the batch itself
            log.warning("reroute_failed reason=%s", type(error).__name__)
            return False
        worker_state.task_ready(self)
        request.acknowledge()
        if address := Header.address(body):
            request.task.backend.undo_attempt(*address)
        health = context.controller.health
        log.warning(
            "batch_rerouted job=%s index=%s code=%s reason=%s",
            body.get("job"),
            body.get("i"),
            health.code,
            health.reason,
        )
        return True


class BatchTask(Task[..., Any]):
    """A task whose messages have the SDK's headers when a worker publishes them again."""

    abstract = True
    Request = "embedq_worker.main_process.rerouting:BatchRequest"

    def apply_async(  # type: ignore[override] # every option of Celery passes through
        self, args: Any = None, kwargs: Any = None, **options: Any
    ) -> Any:
        """Publish a batch; Celery calls this when a pool process died."""
        if args and isinstance(args[0], Mapping):
            headers = options.get("headers") or {}
            options.update(message_headers(args[0], headers.get(PUBLISHED_HEADER) or time.time()))
            options["headers"] |= headers
        return super().apply_async(args, kwargs, **options)
