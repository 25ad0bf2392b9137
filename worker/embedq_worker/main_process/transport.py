"""Kombu's Redis transport with validation: no message in a queue can stop a worker.

Kombu parses a message right after it is popped, and an exception there ends the worker's event
loop. This transport validates each message first. It drops an invalid one and logs its size and
digest, never its content.

It overrides private methods of kombu and redis-py: `_brpop_read`, `_size`, `_put`,
`_handle_message`, `_get_client`, `_remove_from_indices` and `BaseParser.EXCEPTION_CLASSES`.
pyproject.toml bounds both libraries for that reason. `main_process/consumer.py` overrides two more,
`Connection._ensure_connection` and the pool's `did_start_ok`.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any, Final, NoReturn

import msgpack
import redis
from kombu import compression, transport
from kombu.transport import redis as kombu_redis
from kombu.utils.json import dumps
from redis._parsers.base import BaseParser
from redis.exceptions import OutOfMemoryError, ReadOnlyError, ResponseError

from embedq.protocol.contract import MAX_RAW_BYTES, TASK_NAME, Queue

log = logging.getLogger(__name__)

#: Largest message in Redis, bytes: the largest batch, incompressible, in base64, and headers.
MAX_MESSAGE_BYTES: Final = MAX_RAW_BYTES * 4 // 3 + 256 * 1024

#: The only serializer a batch may use.
CONTENT_TYPE: Final = "application/x-msgpack"

#: Longest name or id, characters.
MAX_NAME: Final = 256

#: Deepest nesting of maps and lists; embedq's messages have three levels. A message of 750 can be
#: parsed, but not pickled for the pool process, and would end one worker after another.
MAX_LEVELS: Final = 8


def validate_message(raw: bytes) -> str | None:
    """Return why a message of a queue is not a valid batch, or None if it is.

    Checks everything that kombu and Celery rely on before the task runs. The reason quotes nothing
    of the message.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        return f"it is larger than {MAX_MESSAGE_BYTES:,} bytes"
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(message, dict):
        return "it is not a map"
    if _is_deeper(message, MAX_LEVELS):
        return f"it has more than {MAX_LEVELS} levels"
    body, headers, properties = (message.get(key) for key in ("body", "headers", "properties"))
    if not (isinstance(body, str) and isinstance(headers, dict) and isinstance(properties, dict)):
        return "body, headers or properties are missing"
    return _envelope(message, properties) or _headers(headers) or _body(body)


def validate_broadcast(raw: bytes) -> str | None:
    """Return why a message to all workers is not a valid remote control command, or None.

    Kombu reads these parts in the event loop of each worker.
    """
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(message, dict) or _is_deeper(message, MAX_LEVELS):
        return "it is not a map of few levels"
    body, headers, properties = (message.get(key) for key in ("body", "headers", "properties"))
    if not (isinstance(body, str) and isinstance(headers, dict) and isinstance(properties, dict)):
        return "body, headers or properties are missing"
    if not _is_name(properties.get("delivery_tag")) or properties.get("body_encoding") != "base64":
        return "it has no delivery tag, or its body is not base64"
    try:
        json.loads(binascii.a2b_base64(body, strict_mode=True))
    except (ValueError, binascii.Error, RecursionError):
        return "its body is not JSON in base64"
    return None


def _envelope(message: Mapping[str, Any], properties: Mapping[str, Any]) -> str | None:
    delivery = properties.get("delivery_info")
    if not isinstance(delivery, dict) or not _is_name(properties.get("delivery_tag")):
        return "it has no delivery tag or address"
    if not all(_is_name(delivery.get(key)) for key in ("exchange", "routing_key")):
        return "it has no delivery tag or address"
    if properties.get("body_encoding") != "base64":
        return "its body is not base64"
    if message.get("content-type") != CONTENT_TYPE or message.get("content-encoding") != "binary":
        return f"its content is not {CONTENT_TYPE}"
    for key in ("correlation_id", "reply_to"):
        if not _is_name_or_none(properties.get(key)):
            return f"its {key} is not a name"
    return None if _is_count(properties.get("priority", 0)) else "its priority is not a number"


def _headers(headers: Mapping[str, Any]) -> str | None:
    if headers.get("task") != TASK_NAME:
        return f"it is not for the task {TASK_NAME}"
    task_id = headers.get("id")
    if not task_id or not _is_name(task_id):
        return "it has no task id"
    if "compression" in headers:
        return "it asks for an unbounded decompression"
    for name, is_right in _CHECKS.items():
        if name in headers and not is_right(headers[name]):
            return f"its header {name} is not one that embedq writes"
    return None


def _body(body: str) -> str | None:
    try:
        payload = msgpack.unpackb(binascii.a2b_base64(body, strict_mode=True))
    # kombu decodes the body again with the same limits.
    except (ValueError, binascii.Error, msgpack.UnpackException, RecursionError):
        return "its body is not msgpack in base64"
    if not isinstance(payload, list) or len(payload) != 3:
        return "its body is not a call"
    args, kwargs, embed = payload
    if not (isinstance(args, list) and len(args) == 1 and isinstance(args[0], dict)):
        return "its arguments are not one batch"
    if kwargs != {} or not isinstance(embed, dict) or any(embed.values()):
        return "it carries work for other tasks"
    return None


def _is_deeper(value: object, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    parts = value.values() if isinstance(value, dict) else value
    return not levels or any(_is_deeper(part, levels - 1) for part in parts)


def _is_name(value: object) -> bool:
    # JSON may contain a lone surrogate, which redis-py cannot encode.
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_name_or_none(value: object) -> bool:
    return value is None or _is_name(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_absent(value: object) -> bool:
    return not value


#: Headers that Celery acts upon -> whether a value is allowed.
_CHECKS: Final[Mapping[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("root_id", "parent_id", "origin", "lang", "shadow"), _is_name_or_none),
    **dict.fromkeys(("argsrepr", "kwargsrepr"), _is_name_or_none),
    **dict.fromkeys(("retries", "replaced_task_nesting"), _is_count),
    **dict.fromkeys(("chain", "callbacks", "errbacks", "chord"), _is_absent),
    **dict.fromkeys(("group", "group_index"), _is_absent),
    # A batch waits in its queue only: with an eta a worker would hold it until then.
    **dict.fromkeys(("eta", "expires", "stamps", "stamped_headers"), _is_absent),
    "timelimit": lambda value: value in (None, [None, None]),
    "ignore_result": lambda value: value is True,
}

#: Redis lists that hold batches; kombu adds a suffix for each priority but the first.
_BATCH_QUEUES: Final = frozenset(str(queue).encode() for queue in Queue)
_PRIORITY_SEPARATOR: Final = b"\x06\x16"

#: Errors of a Redis that has become a replica while a client waits for a message, and of one that
#: cannot write to its disk, which then refuses even a ping.
_NO_WRITES: Final = ("UNBLOCKED", "MISCONF")

#: Error of a key that is not a list; Celery would end the worker.
_WRONG_TYPE: Final = "WRONGTYPE"


class _CheckedClient(redis.Redis):
    """A Redis client whose pops return valid batches only."""

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        """Parse a reply; the pop of an invalid message looks like one that timed out."""
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # untyped in redis-py
        if command_name != "BRPOP" or not reply:
            return reply
        queue, raw = reply
        if queue.partition(_PRIORITY_SEPARATOR)[0] not in _BATCH_QUEUES:
            return reply
        reason = validate_message(raw)
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
    """Unacknowledged messages, which can be acknowledged while Redis is full."""

    def _remove_from_indices(self, delivery_tag: Any, pipe: Any = None) -> Any:
        if pipe is None:
            # No transaction, which a full Redis refuses. The index comes last: a crash in between
            # leaves an entry that kombu's search for expired leases removes.
            with self.channel.conn_or_acquire() as client:  # type: ignore[attr-defined] # not in types
                pipe = client.pipeline(transaction=False)
        return pipe.hdel(self.unacked_key, delivery_tag).zrem(self.unacked_index_key, delivery_tag)


class Channel(kombu_redis.Channel):
    """A channel that validates messages and requeues batches at the head of their queue."""

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
        """Return the length of a queue; a key that is not a list is deleted."""
        try:
            return int(super()._size(queue))
        except ResponseError as error:
            if _WRONG_TYPE not in str(error):
                raise
        with self.conn_or_acquire() as client:
            for priority in self.priority_steps:
                _delete_unless_list(client, self._q_for_pri(queue, priority))  # type: ignore[attr-defined] # not in types
        return 0

    def _put(self, queue: str, message: Any, **kwargs: Any) -> Any:
        # A worker publishes only batches that have waited already: rerouted, or of a pool process
        # that died. At the tail they would wait for the whole backlog again.
        if queue.encode() not in _BATCH_QUEUES or kwargs.get("_publish_batch") is not None:
            return super()._put(queue, message, **kwargs)
        priority = self._get_message_priority(message, reverse=False)
        with self.conn_or_acquire() as client:
            key = self._q_for_pri(queue, priority)  # type: ignore[attr-defined] # not in types
            return client.rpush(key, dumps(message))

    def _handle_message(self, client: Any, r: Any) -> dict[str, Any]:
        message: dict[str, Any] = super()._handle_message(client, r)  # type: ignore[misc] # not in types
        if bytes(message["type"]).endswith(b"message") and message["data"]:
            reason = validate_broadcast(message["data"])
            if reason is not None:
                log.error("broadcast_refused bytes=%d reason=%s", len(message["data"]), reason)
                message["data"] = None  # kombu ignores it
        return message

    def _get_client(self) -> Any:
        return _CheckedClient


def _delete_unless_list(client: Any, key: str) -> None:
    try:
        client.llen(key)
    except ResponseError as error:
        if not str(error).startswith(_WRONG_TYPE):
            raise
        log.error("queue_refused queue=%s reason=the key is not a list", key)
        client.delete(key)


class Transport(kombu_redis.Transport):
    """The Redis transport of a worker."""

    Channel = Channel
    # A full Redis and a read-only one are waited for like one that is away. Otherwise Celery ends
    # the worker, and a fail-over of ten seconds becomes a crash loop.
    connection_errors = (
        *kombu_redis.Transport.connection_errors,
        OutOfMemoryError,
        ReadOnlyError,
    )


def _refuse(_: bytes) -> NoReturn:
    raise ValueError("embedq refuses messages that kombu compressed.")


def install() -> None:
    """Use this transport for every Redis URL, and refuse compressed messages.

    The setting `broker_transport` is not enough: the URL of a unix socket names its transport.
    """
    for scheme in ("redis", "rediss"):
        transport.TRANSPORT_ALIASES[scheme] = "embedq_worker.main_process.transport:Transport"
    # In the parser, as a worker that consumes nothing only pings and would not see these errors.
    BaseParser.EXCEPTION_CLASSES.update(dict.fromkeys(_NO_WRITES, ReadOnlyError))
    # Kombu would decompress without a size limit.
    for content_type in compression.encoders():
        compression.register(_refuse, _refuse, content_type)
