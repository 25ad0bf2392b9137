"""Build messages as an attacker, a broken producer or another version would send them."""

from __future__ import annotations

import base64
import json
from typing import Any

import msgpack
from tests.support.redis import RedisProcess
from tests.support.stub_batches import STUB_SPEC

from embedq.jobs.publisher import Publisher
from embedq.protocol.contract import Queue, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.store.ledger import Ledger

#: Text that no log, header or event may contain.
MARKER = "Kundengeheimnis"
#: A Redis database that no worker consumes.
UNUSED_DB = 7


def queued(redis: RedisProcess, batch: EmbedBatch, queue: Queue = Queue.CPU) -> dict[str, Any]:
    """Return the message that a producer publishes for a batch."""
    publisher = Publisher(redis.broker_url(UNUSED_DB))
    publisher.publish(batch, queue)
    publisher.close()
    with redis.open(UNUSED_DB) as client:
        raw = client.lpop(str(queue))
    assert isinstance(raw, bytes)
    message: dict[str, Any] = json.loads(raw)
    return message


def payload(message: dict[str, Any]) -> Any:
    """Return the decoded body of a message: [args, kwargs, embed]."""
    return msgpack.unpackb(base64.b64decode(message["body"]))


def with_body(message: dict[str, Any], body: bytes) -> dict[str, Any]:
    return {**message, "body": base64.b64encode(body).decode()}


def with_payload(message: dict[str, Any], value: object) -> dict[str, Any]:
    return with_body(message, msgpack.packb(value))


def with_batch(message: dict[str, Any], **fields: object) -> dict[str, Any]:
    """Return the message with other fields in its batch; None removes a field."""
    [batch], kwargs, embed = payload(message)
    changed = {key: value for key, value in {**batch, **fields}.items() if value is not None}
    return with_payload(message, [[changed], kwargs, embed])


def with_headers(message: dict[str, Any], **fields: object) -> dict[str, Any]:
    return {**message, "headers": {**message["headers"], **fields}}


def without_header(message: dict[str, Any], name: str) -> dict[str, Any]:
    headers = {key: value for key, value in message["headers"].items() if key != name}
    return {**message, "headers": headers}


def open_job(redis: RedisProcess, job: str, spec: VectorSpec = STUB_SPEC) -> Ledger:
    ledger = Ledger(redis.open(), job)
    ledger.open(fingerprint=spec.fingerprint(), ttl_s=600)
    return ledger


def push(redis: RedisProcess, message: object, queue: Queue = Queue.CPU) -> None:
    """Publish a message, or raw bytes, to a queue that a worker consumes."""
    raw = message if isinstance(message, bytes) else json.dumps(message).encode()
    with redis.open(0) as client:
        client.lpush(str(queue), raw)
