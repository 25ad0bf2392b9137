"""Publishes batches as Celery messages, whose headers contain no text of the caller."""

from __future__ import annotations

import time
from typing import Any, Final

from celery import Celery
from kombu import Queue as KombuQueue
from kombu.exceptions import OperationalError
from kombu.pools import ProducerPool
from redis import exceptions

from embedq.observability.tracing import JobTrace
from embedq.protocol.contract import TASK_NAME, Queue
from embedq.protocol.message import EmbedBatch, message_headers

#: Maximum number of connections; a caller with one thread needs one.
MAX_CONNECTIONS: Final = 10


class Publisher:
    """Publishes batches; safe to use from one thread."""

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("embedq", broker=broker_url, set_as_current=False)
        self._app.conf.update(
            task_serializer="msgpack",
            accept_content=["msgpack"],
            task_queues=[KombuQueue(str(name)) for name in Queue],
            task_default_queue=str(Queue.NPU),
            # A misspelled queue name must raise, not create a queue without consumers.
            task_create_missing_queues=False,
            # Results are read from the ledger.
            task_ignore_result=True,
            # Flower shows the time that a batch waited in its queue.
            task_send_sent_event=True,
            broker_transport_options={
                "socket_timeout": 30,
                "socket_connect_timeout": 5,
                "socket_keepalive": True,
                "client_name": "embedq",
            },
        )
        # Its own pools: those of kombu are shared by the process and outlive close().
        self._connections = self._app.connection_for_write().Pool(MAX_CONNECTIONS)
        self._producers = ProducerPool(self._connections, limit=MAX_CONNECTIONS)

    def publish(self, batch: EmbedBatch, queue: Queue, trace: JobTrace | None = None) -> None:
        """Publish one batch; publishing it twice is safe, the ledger accepts the first commit.

        Args:
            batch: the batch.
            queue: its queue.
            trace: trace of its job; None starts one.

        Raises:
            redis.exceptions.RedisError: the publish failed.
        """
        body = batch.to_message()
        options: dict[str, Any] = {
            "task_id": batch.task_id,
            "queue": str(queue),
            "ignore_result": True,
            "retry": False,  # RedisConnection.call retries
            **message_headers(body, time.time()),
        }
        try:
            trace = trace or JobTrace(batch.job)
            with (
                trace.publishing(options["headers"], index=batch.index, texts=len(batch.texts)),
                self._producers.acquire(block=True) as producer,
            ):
                self._app.send_task(TASK_NAME, args=(body,), producer=producer, **options)
        except OperationalError as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, exceptions.RedisError):
                raise cause from None
            raise exceptions.ConnectionError(type(error).__name__) from error

    def close(self) -> None:
        """Close the connections to the broker; `publish` opens new ones."""
        pools: tuple[Any, ...] = (self._producers, self._connections)
        for pool in pools:
            pool.force_close_all(close_pool=False)
        self._app.close()
