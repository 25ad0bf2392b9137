"""Tests of rerouting a batch of a failed NPU to the CPU queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
from celery import Celery
from celery.exceptions import Ignore, Reject

from embedq.protocol.contract import PUBLISHED_HEADER, Queue
from embedq_worker.main_process import rerouting
from embedq_worker.main_process.status import COUNTERS

PUBLISHED = 1_700_000_000.5
BODY = {"job": "ab" * 8, "index": 3, "texts": ["one", "two"]}


def app_with(broker: str) -> Celery:
    """Return an app with one task and a broker."""
    app = Celery("test", broker=broker, set_as_current=False)
    app.conf.update(
        task_publish_retry=False,
        broker_transport_options={"polling_interval": 0.01},
        task_ignore_result=True,
    )

    @app.task(name="embed", shared=False)
    def embed(body: object) -> None:
        pass

    return app


@pytest.fixture
def app() -> Iterator[Celery]:
    """Open an app whose broker is in memory."""
    opened = app_with("memory://")
    with opened.connection_for_write() as connection:
        for queue in Queue:
            connection.SimpleQueue(str(queue)).clear()
    yield opened
    opened.close()


def reroute(app: Celery, queue: str = Queue.NPU, **changes: object) -> NoReturn:
    """Reroute a batch that was consumed from a queue."""
    task = app.tasks["embed"]
    body = {**BODY, **changes}
    delivery = {"routing_key": str(queue), "exchange": ""}
    task.push_request(
        id="batch-id", args=(body,), delivery_info=delivery, **{PUBLISHED_HEADER: PUBLISHED}
    )
    try:
        rerouting.reroute_or_requeue(task, body, "device_lost", "The device is gone.")
    finally:
        task.pop_request()


def queued(app: Celery) -> dict[str, list[Any]]:
    """Return the messages of every queue that has any."""
    found: dict[str, list[Any]] = {}
    with app.connection_for_read() as connection:
        for queue in map(str, Queue):
            simple_queue = connection.SimpleQueue(queue)
            found[queue] = [simple_queue.get_nowait() for _ in range(simple_queue.qsize())]
    return {queue: messages for queue, messages in found.items() if messages}


def test_rerouted_batch_keeps_id_texts_and_publish_time(app: Celery) -> None:
    before = COUNTERS["rerouted"]

    with pytest.raises(Ignore):
        reroute(app)

    [(queue, [message])] = queued(app).items()
    assert queue == "embed.cpu"
    assert message.headers["id"] == "batch-id"
    assert message.headers[PUBLISHED_HEADER] == PUBLISHED
    args, kwargs, _ = message.payload
    assert (args, kwargs) == ([{**BODY, "rerouted": True}], {})
    assert COUNTERS["rerouted"] == before + 1


@pytest.mark.parametrize(
    ("queue", "changes"),
    [
        (Queue.NPU_STRICT, {}),
        (Queue.CPU, {}),
        (Queue.CPU_INT8, {}),
        (Queue.NPU, {"rerouted": True}),
        ("", {}),
    ],
    ids=["strict", "from the CPU", "from int8", "for the second time", "from nowhere"],
)
def test_batch_that_may_not_be_rerouted_is_requeued(
    app: Celery, queue: str, changes: dict[str, object]
) -> None:
    with pytest.raises(Reject) as caught:
        reroute(app, queue, **changes)

    assert caught.value.requeue  # type: ignore[attr-defined] # not in celery-types
    assert queued(app) == {}


def test_batch_whose_publish_fails_is_requeued() -> None:
    app = app_with("redis://127.0.0.1:1/0")
    before = COUNTERS["rerouted"]

    with pytest.raises(Reject) as caught:
        reroute(app)

    assert caught.value.requeue  # type: ignore[attr-defined] # not in celery-types
    assert COUNTERS["rerouted"] == before
    app.close()
