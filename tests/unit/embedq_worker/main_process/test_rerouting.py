"""A batch whose NPU failed goes to the CPU queue as it is, once, or back to where it came from."""

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
    """Return an app with a task, as a worker's child has it."""
    app = Celery("test", broker=broker, set_as_current=False)
    app.conf.update(
        task_publish_retry=False,
        broker_transport_options={"polling_interval": 0.01},
        task_ignore_result=True,
    )

    @app.task(name="embed", shared=False)
    def embed(body: object) -> None:
        """Never run here."""

    return app


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app whose broker lives in this process."""
    made = app_with("memory://")
    with made.connection_for_write() as connection:
        for queue in Queue:
            connection.SimpleQueue(str(queue)).clear()
    yield made
    made.close()


def hand_over(app: Celery, queue: str = Queue.NPU, **changes: object) -> NoReturn:
    """Hand a batch over that came from a queue."""
    task = app.tasks["embed"]
    body = {**BODY, **changes}
    delivery = {"routing_key": str(queue), "exchange": ""}
    task.push_request(
        id="id-of-it", args=(body,), delivery_info=delivery, **{PUBLISHED_HEADER: PUBLISHED}
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
            waiting = connection.SimpleQueue(queue)
            found[queue] = [waiting.get_nowait() for _ in range(waiting.qsize())]
    return {queue: messages for queue, messages in found.items() if messages}


def test_batch_goes_on_as_the_same_one(app: Celery) -> None:
    """Id, texts and age stay; Celery acknowledges it as neither done nor failed."""
    before = COUNTERS["rerouted"]

    with pytest.raises(Ignore):
        hand_over(app)

    [(queue, [message])] = queued(app).items()
    assert queue == "embed.cpu"
    assert message.headers["id"] == "id-of-it"
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
def test_no_batch_travels_in_a_circle(app: Celery, queue: str, changes: dict[str, object]) -> None:
    """A batch that may not go to the CPU queue goes back to the one that it came from."""
    with pytest.raises(Reject) as caught:
        hand_over(app, queue, **changes)

    assert caught.value.requeue  # type: ignore[attr-defined] # not in celery-types
    assert queued(app) == {}


def test_batch_that_cannot_be_published_stays_ours() -> None:
    """A broker that is gone in this very moment costs a redelivery, never the batch."""
    app = app_with("redis://127.0.0.1:1/0")
    before = COUNTERS["rerouted"]

    with pytest.raises(Reject) as caught:
        hand_over(app)

    assert caught.value.requeue  # type: ignore[attr-defined] # not in celery-types
    assert COUNTERS["rerouted"] == before
    app.close()
