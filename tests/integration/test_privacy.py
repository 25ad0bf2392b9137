"""Texts appear only in the payload of messages: not in headers, events, logs or inspection."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from tests.support.forged_messages import MARKER, push, queued, with_body
from tests.support.redis import RedisProcess, wait_for
from tests.support.stub_batches import stub_batch
from tests.support.workers import WorkerProcess, stopped_worker

from embedq import Client
from embedq.errors import TextsFailed
from embedq.protocol.contract import Queue

#: Too short for zstd to compress, so that the body of a message contains them as they are.
TEXTS = [f"{MARKER} {i}" for i in range(3)]
PASSWORD = "correct-horse-battery"


@contextmanager
def remote(redis: RedisProcess) -> Iterator[Celery]:
    """Open a Celery app as an operator does."""
    app = Celery("operator", broker=redis.broker_url(), set_as_current=False)
    try:
        yield app
    finally:
        app.close()


@contextmanager
def captured_events(app: Celery) -> Iterator[list[dict[str, Any]]]:
    """Collect all Celery events during the block, as Flower does."""
    events: list[dict[str, Any]] = []
    listening = threading.Event()

    class Receiver(app.events.Receiver):  # type: ignore[name-defined, misc] # made by the app
        def on_consume_ready(self, *args: Any, **options: Any) -> None:
            listening.set()

    with app.connection_for_read() as connection:
        receiver = Receiver(connection, handlers={"*": events.append})
        thread = threading.Thread(target=lambda: list(receiver.consume(limit=None)))
        thread.start()
        assert listening.wait(10)
        try:
            yield events
        finally:
            receiver.should_stop = True
            thread.join()


@contextmanager
def captured_commands(redis: RedisProcess) -> Iterator[list[str]]:
    """Collect all Redis commands during the block."""
    commands: list[str] = []
    with redis.open() as client, client.monitor() as monitor:

        def listen() -> None:
            for command in monitor.listen():
                commands.append(command["command"])
                if command["command"] == "ECHO the-end":
                    return

        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield commands
        finally:
            client.echo("the-end")
            thread.join()


def test_message_contains_text_only_in_its_body(redis: RedisProcess) -> None:
    message = queued(redis, stub_batch(TEXTS))

    body = base64.b64decode(message.pop("body"))

    assert MARKER.encode() in body
    assert MARKER not in json.dumps(message)
    assert message["headers"]["argsrepr"] == "<3 texts, 0 kB>"
    assert message["content-type"] == "application/x-msgpack"


def test_events_and_logs_contain_no_text(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    with remote(shared_redis) as app, captured_events(app) as events:
        client.encode(TEXTS)
        with pytest.raises(TextsFailed):
            client.encode([f"{MARKER}\0"])

        wait_for(lambda: [e for e in events if e["type"] == "task-succeeded"][1:], "the events")

    kinds = {event["type"] for event in events}
    assert {"task-sent", "task-received", "task-started", "task-succeeded"} <= kinds
    assert MARKER not in repr(events)
    assert MARKER not in worker.log()


def test_inspection_shows_no_text(redis: RedisProcess, short_dir: Path) -> None:
    """Celery's inspection of a busy worker shows a description instead of the arguments."""
    with (
        stopped_worker(redis, short_dir, EMBEDQ_STUB_TEXTS_PER_S="20") as worker,
        Client(settings=redis.settings()) as client,
        remote(redis) as app,
    ):
        # With a limit the call returns as soon as one worker has answered.
        inspect = app.control.inspect(timeout=5, limit=1)
        job = client.job(client.split(TEXTS * 20, client.spec()), client.spec())
        job.start()
        active = wait_for(lambda: next(iter((inspect.active() or {}).values()), []), "a batch")
        shown = [inspect.query_task(active[0]["id"]), inspect.reserved(), inspect.stats()]
        shown.append(inspect.conf(with_defaults=True))
        job.cancel()

    assert active[0]["name"] == "embedq.embed_batch"
    assert str(active[0]["args"]) == "<60 texts, 1 kB>"
    assert all(shown)
    assert MARKER not in repr([active, shown])
    assert "<60 texts, 1 kB>" in repr(shown[0])
    assert MARKER not in worker.log()


def test_log_and_inspection_show_no_password(short_dir: Path) -> None:
    redis = RedisProcess(short_dir, password=PASSWORD)
    try:
        with stopped_worker(redis, short_dir) as worker, remote(redis) as app:
            shown = app.control.inspect(timeout=5, limit=1).conf(with_defaults=True)
    finally:
        redis.stop()

    assert "embedq" in repr(shown)
    assert PASSWORD not in repr(shown)
    assert PASSWORD not in worker.log()


def test_batch_requeued_after_a_crash_contains_no_text(
    redis: RedisProcess, short_dir: Path
) -> None:
    """Celery publishes a batch again whose pool process died."""
    with (
        stopped_worker(redis, short_dir) as worker,
        Client(settings=redis.settings()) as client,
        remote(redis) as app,
        captured_events(app) as events,
        captured_commands(redis) as commands,
    ):
        with pytest.raises(TextsFailed):
            client.encode([f"embedq-fault:exit {MARKER}"], timeout_s=30)

        wait_for(lambda: [e for e in events if e["type"] == "task-retried"][3:], "the retries")

    assert sum(c.startswith(("LPUSH embed.", "RPUSH embed.")) for c in commands) > 4
    # Bodies are base64, so a readable word is in a header or key. A dead letter contains its text.
    assert not [c for c in commands if MARKER in c and not c.startswith("HSETNX embedq:dead")]
    assert MARKER not in repr(events)
    assert MARKER not in worker.log()


def test_undecodable_message_is_logged_with_size_and_digest(
    worker: WorkerProcess, client: Client, shared_redis: RedisProcess
) -> None:
    message = queued(shared_redis, stub_batch(TEXTS))

    push(shared_redis, with_body(message, MARKER.encode() * 100), Queue.NPU)
    client.encode(["after"])

    [line] = worker.lines("message_refused")[-1:]
    assert "bytes=" in line
    assert "sha256=" in line
    assert MARKER not in worker.log()
