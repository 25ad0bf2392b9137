"""Kombu's Redis transport, hardened: nothing that lies in a queue can stop a node.

Kombu parses what it pops before anybody may look at it, and an exception there ends the worker's
event loop. Here every pop is bounded and checked first; what is not a message of ours is dropped
with a line in the log that gives its size and digest, never its content.
"""

from __future__ import annotations

import binascii
import hashlib
import json
import logging
from typing import Any, Final, NoReturn

import redis
from kombu import compression
from kombu.transport import redis as kombu_redis

from embedq.contract import MAX_RAW_BYTES, TASK_NAME

log = logging.getLogger("embedq.worker")

#: Most bytes of one message in Redis: the largest batch, incompressible, in base64, and headers.
MAX_MESSAGE_BYTES: Final = MAX_RAW_BYTES * 4 // 3 + 256 * 1024
#: The only serializer a batch may use.
CONTENT_TYPE: Final = "application/x-msgpack"


def objection(raw: bytes) -> str | None:
    """Say why popped bytes are not a message of ours, or None if they are.

    Checks everything that kombu and Celery take for granted before the task itself runs.
    """
    if len(raw) > MAX_MESSAGE_BYTES:
        return f"it is larger than {MAX_MESSAGE_BYTES:,} bytes"
    try:
        message = json.loads(raw)
    except (ValueError, RecursionError):
        return "it is not JSON"
    if not isinstance(message, dict):
        return "it is not a map"
    body, headers, properties = (message.get(key) for key in ("body", "headers", "properties"))
    if not (isinstance(body, str) and isinstance(headers, dict) and isinstance(properties, dict)):
        return "body, headers or properties are missing"
    return _envelope(message, properties) or _headers(headers) or _body(body)


def _envelope(message: dict[str, Any], properties: dict[str, Any]) -> str | None:
    delivery = properties.get("delivery_info")
    addressed = isinstance(delivery, dict) and all(
        isinstance(delivery.get(key), str) for key in ("exchange", "routing_key")
    )
    if not addressed or not isinstance(properties.get("delivery_tag"), str):
        return "it has no delivery tag or address"
    if properties.get("body_encoding") != "base64":
        return "its body is not base64"
    if message.get("content-type") != CONTENT_TYPE or message.get("content-encoding") != "binary":
        return f"its content is not {CONTENT_TYPE}"
    return None


def _headers(headers: dict[str, Any]) -> str | None:
    if headers.get("task") != TASK_NAME:
        return f"it is not for the task {TASK_NAME}"
    task_id = headers.get("id")
    if not isinstance(task_id, str) or not 0 < len(task_id) <= 128:
        return "it has no task id"
    if "compression" in headers:
        return "it asks for an unbounded decompression"
    if any(headers.get(key) for key in ("chain", "callbacks", "errbacks", "chord", "group")):
        return "it carries work for other tasks"
    if headers.get("timelimit") not in (None, [None, None], [0, 0]):
        return "it sets its own time limit"
    if type(headers.get("retries", 0)) is not int:
        return "its count of retries is not a number"
    return None


def _body(body: str) -> str | None:
    try:
        binascii.a2b_base64(body, strict_mode=True)
    except (ValueError, binascii.Error):
        return "its body is not base64"
    return None


class _CheckedClient(redis.Redis):
    """A Redis client that lets a pop through only if it is a message of ours."""

    def parse_response(self, connection: Any, command_name: str, **options: Any) -> Any:
        """Parse a reply; a refused pop looks like one that timed out."""
        reply = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call] # untyped in redis-py
        if command_name != "BRPOP" or not reply:
            return reply
        queue, raw = reply
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


class Channel(kombu_redis.Channel):
    """A channel whose pops are checked."""

    def _get_client(self) -> Any:
        return _CheckedClient


class Transport(kombu_redis.Transport):
    """The Redis transport of a node."""

    Channel = Channel


def _refuse(_: bytes) -> NoReturn:
    raise ValueError("embedq accepts no message compression of kombu's.")


def switch_off_decompression() -> None:
    """Make kombu refuse compressed messages: it would inflate them without any limit."""
    for content_type in compression.encoders():
        compression.register(_refuse, _refuse, content_type)


switch_off_decompression()
