"""A batch in hand whose NPU failed under it goes to the CPU queue: same id, no attempt, no failure.

Only from `embed.npu` to `embed.cpu`, so that no batch ever travels in a circle. A strict batch
goes back to its own queue, where another NPU may take it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from celery.exceptions import Ignore, Reject

from embedq.contract import PUBLISHED_HEADER, Queue
from embedq.header import Header
from embedq_worker.tally import TALLY

log = logging.getLogger("embedq.worker")

#: Headers of ours, and those of W3C Trace Context.
KEPT: Final = (PUBLISHED_HEADER, "traceparent", "tracestate")


def process_name(node: str, pid: object) -> str:
    """Name a process of the fleet."""
    return f"{node}:{pid}"


def may_reroute(queue: str, body: Mapping[str, Any]) -> bool:
    """Tell whether a batch of this queue may be handed to the CPU."""
    return queue == Queue.NPU and not body.get("rerouted")


def kept_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a message keeps when it is published again: its age, and whose trace it is in.

    The reconciler takes the head of a queue for its oldest message.
    """
    return {name: headers[name] for name in KEPT if headers.get(name) is not None}


def publish(task: Any, request: Any, body: Mapping[str, Any]) -> None:
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
    TALLY.rerouted += 1


def hand_over(task: Any, body: Any, code: str, reason: str) -> NoReturn:
    """Give the batch in hand away, from the process that was to embed it.

    Raises:
        Ignore: it is in the CPU queue; the parent acknowledges the message.
        Reject: it could not be published, or is strict: it goes back to the queue it came from.
    """
    job, index = Header.address(body) or ("", -1)
    queue = (task.request.delivery_info or {}).get("routing_key", "")
    if not may_reroute(queue, body):
        log.warning("batch_handed_back job=%s index=%d queue=%s code=%s", job, index, queue, code)
        raise Reject(reason, requeue=True)
    try:
        publish(task, task.request, body)
    except Exception as error:  # whatever it is: the message must stay ours
        log.warning(
            "batch_handed_back job=%s index=%d code=%s reason=%s",
            job,
            index,
            code,
            type(error).__name__,
        )
        raise Reject(reason, requeue=True) from None
    log.warning("batch_rerouted job=%s index=%d code=%s reason=%s", job, index, code, reason)
    raise Ignore
