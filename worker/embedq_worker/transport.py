"""Kombu's Redis transport, hardened: nothing that lies in a queue can stop a node.

Kombu parses what it pops before anybody may look at it, and an exception there ends the worker's
event loop. Here every pop from a queue of batches is checked first; what is not a message of ours
is dropped with a line in the log that gives its size and digest, never its content.
"""

from __future__ import annotations

import hashlib
import logging
from queue import Empty
from typing import Any, Final, NoReturn

import redis
from kombu import compression, transport
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from redis._parsers.base import BaseParser
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from embedq.contract import Queue
from embedq_worker.admission import broadcast_objection, objection

log = logging.getLogger("embedq.worker")

#: The lists of Redis that carry batches; kombu adds a suffix for each priority but the first.
_BATCHES: Final = frozenset(str(queue).encode() for queue in Queue)
_PRIORITY: Final = b"\x06\x16"
#: What Redis says to whoever waits for a message when it becomes a replica, and when it cannot
#: write to its disk: then even to the ping with which a client looks whether it is there.
_NO_WRITES: Final = ("UNBLOCKED", "MISCONF")
#: What Redis says of a key that holds something else than a list: Celery ends the node over it.
_WRONG_TYPE: Final = "WRONGTYPE"


class _CheckedClient(redis.Redis):
    """A Redis client that lets a pop of a batch through only if it is a message of ours."""

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        """Parse a reply; a refused pop looks like one that timed out."""
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # untyped in redis-py
        if command_name != "BRPOP" or not reply:
            return reply
        queue, raw = reply
        if queue.partition(_PRIORITY)[0] not in _BATCHES:
            return reply
        reason = objection(raw)
        if reason is None:
            return reply
        log.error(
            "message_refused queue=%s bytes=%d sha256=%s reason=%s",
            queue.decode(errors="replace"),
            len(raw),
            hashlib.sha256(raw).hexdigest()[:16],
            reason,
        )
        return None


class QoS(kombu_redis.QoS):
    """The messages in hand, which can be acknowledged while Redis is full."""

    def _remove_from_indices(self, delivery_tag: Any, pipe: Any = None) -> Any:
        if pipe is None:
            # A full Redis refuses whatever comes in a transaction, and frees nothing meanwhile.
            # Last the index, so that what a crash leaves in between is swept.
            with self.channel.conn_or_acquire() as client:  # type: ignore[attr-defined] # not in types
                pipe = client.pipeline(transaction=False)
        return pipe.hdel(self.unacked_key, delivery_tag).zrem(self.unacked_index_key, delivery_tag)


class Channel(kombu_redis.Channel):
    """A channel whose pops are checked, and whose batches go to the head of their queue."""

    QoS = QoS

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[misc] # not in types
        except ResponseError as error:
            if not str(error).startswith(_WRONG_TYPE):
                raise
            for queue in self.active_queues:
                self._size(queue)
            raise Empty from None

    def _size(self, queue: str) -> int:
        """Count the messages of a queue; what is no list at its key is dropped."""
        try:
            return int(super()._size(queue))
        except ResponseError as error:
            if _WRONG_TYPE not in str(error):
                raise
        with self.conn_or_acquire() as client:
            for priority in self.priority_steps:
                _drop_unless_list(client, self._q_for_pri(queue, priority))  # type: ignore[attr-defined] # not in types
        return 0

    def _put(self, queue: str, message: Any, **kwargs: Any) -> Any:
        # What a node publishes has waited its turn already: a batch that lost its child, or is
        # handed on. At the tail it would wait for the whole backlog once more.
        if queue.encode() not in _BATCHES or kwargs.get("_publish_batch") is not None:
            return super()._put(queue, message, **kwargs)
        priority = self._get_message_priority(message, reverse=False)
        with self.conn_or_acquire() as client:
            key = self._q_for_pri(queue, priority)  # type: ignore[attr-defined] # not in types
            return client.rpush(key, dumps(message))

    def _handle_message(self, client: Any, r: Any) -> dict[str, Any]:
        heard: dict[str, Any] = super()._handle_message(client, r)  # type: ignore[misc] # not in types
        if bytes(heard["type"]).endswith(b"message") and heard["data"]:
            reason = broadcast_objection(heard["data"])
            if reason is not None:
                log.error("broadcast_refused bytes=%d reason=%s", len(heard["data"]), reason)
                heard["data"] = None  # as kombu has it for nothing
        return heard

    def _get_client(self) -> Any:
        return _CheckedClient


def _drop_unless_list(client: Any, key: str) -> None:
    try:
        client.llen(key)
    except ResponseError as error:
        if not str(error).startswith(_WRONG_TYPE):
            raise
        log.error("queue_refused queue=%s reason=it is no list", key)
        client.delete(key)


class Transport(kombu_redis.Transport):
    """The Redis transport of a node."""

    Channel = Channel
    # A full Redis, or one that takes no writes, is waited for like one that is gone; otherwise
    # Celery ends the node, and a fail-over of ten seconds is a crash loop (measured 2026-11-28).
    connection_errors = (
        *kombu_redis.Transport.connection_errors,
        OutOfMemoryError,
        ReadOnlyError,
    )


def _refuse(_: bytes) -> NoReturn:
    raise ValueError("embedq accepts no message compression of kombu's.")


def install() -> None:
    """Make every Redis URL of this process lead here, and kombu refuse compressed messages.

    The setting `broker_transport` is not enough: a URL of a unix socket names its transport itself.
    """
    for scheme in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[scheme] = "embedq_worker.transport:Transport"
    # Not where commands are sent: a node that takes no batch only listens, and pings (measured).
    BaseParser.EXCEPTION_CLASSES.update(dict.fromkeys(_NO_WRITES, ReadOnlyError))
    # Kombu would inflate them without any limit.
    for content_type in compression.encoders():
        compression.register(_refuse, _refuse, content_type)
