"""What may be handed to Celery at all: pure checks on the bytes of a message.

Celery and kombu take the shape of a message for granted, in the process that serves all others.
"""

from __future__ import annotations

import binascii
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgpack

from embedq.contract import MAX_RAW_BYTES, TASK_NAME

#: Most bytes of one message in Redis: the largest batch, incompressible, in base64, and headers.
MAX_MESSAGE_BYTES: Final = MAX_RAW_BYTES * 4 // 3 + 256 * 1024
#: The only serializer a batch may use.
CONTENT_TYPE: Final = "application/x-msgpack"
#: Most characters of a name or an id.
MAX_NAME: Final = 256
#: Most levels of maps and lists in a message; ours have three. One of 750 was read here and could
#: not be pickled for the child: it ended every node, one after the other (measured 2026-11-28).
MAX_LEVELS: Final = 8


def objection(raw: bytes) -> str | None:
    """Say why bytes of a queue are not a message of ours, or None if they are.

    Checks everything that kombu and Celery rely on before the task itself runs. The answer quotes
    nothing of the message.
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


def broadcast_objection(raw: bytes) -> str | None:
    """Say why bytes that were published to all nodes are not remote control, or None if they are.

    Kombu looks for these parts in the event loop of each node.
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
    # kombu reads the body again with the same limits, so what passes here passes there.
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
    # Redis takes no lone surrogate, which JSON can hold and nobody can print.
    return isinstance(value, str) and len(value) <= MAX_NAME and value.isprintable()


def _is_name_or_none(value: object) -> bool:
    return value is None or _is_name(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _is_absent(value: object) -> bool:
    return not value


#: Headers that Celery acts upon, and what embedq lets them be.
_CHECKS: Final[Mapping[str, Callable[[object], bool]]] = {
    **dict.fromkeys(("root_id", "parent_id", "origin", "lang", "shadow"), _is_name_or_none),
    **dict.fromkeys(("argsrepr", "kwargsrepr"), _is_name_or_none),
    **dict.fromkeys(("retries", "replaced_task_nesting"), _is_count),
    **dict.fromkeys(("chain", "callbacks", "errbacks", "chord"), _is_absent),
    **dict.fromkeys(("group", "group_index"), _is_absent),
    # A batch waits in its queue and nowhere else: an eta would park it in a node's hand.
    **dict.fromkeys(("eta", "expires", "stamps", "stamped_headers"), _is_absent),
    "timelimit": lambda value: value in (None, [None, None]),
    "ignore_result": lambda value: value is True,
}
