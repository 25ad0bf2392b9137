"""`Client.encode` and jobs of the SDK with a real Redis and worker."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis
from tests.support.redis import RedisProcess, wait_for
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.errors import ContractError, QueueUnavailable, ResultExpired, TextsFailed
from embedq.jobs.batches import TextBatch
from embedq.jobs.publisher import Publisher
from embedq.protocol.contract import MAX_TEXT_BYTES
from embedq.protocol.message import EmbedBatch
from embedq.testing import STUB_DIM, stub_vectors

TEXTS = ["plain", "", "emoji 🦀🎉", "שלום עולם", "مرحبا", "a" * 50_000, "日本語"]


def test_list_gives_one_row_per_text_in_order(client: Client) -> None:
    vectors = client.encode(TEXTS)

    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_single_text_gives_one_vector(client: Client) -> None:
    vector = client.encode("only one")

    assert vector.shape == (STUB_DIM,)
    assert np.array_equal(vector, stub_vectors(["only one"])[0])


def test_empty_list_gives_no_rows(client: Client) -> None:
    vectors = client.encode([])

    assert vectors.shape == (0, STUB_DIM)
    assert vectors.dtype == np.float32


def test_encode_accepts_a_generator(client: Client) -> None:
    vectors = client.encode(f"text {i}" for i in range(10))

    assert np.array_equal(vectors, stub_vectors([f"text {i}" for i in range(10)]))


def test_order_is_kept_over_many_batches(client: Client) -> None:
    texts = [f"text {i} {'word ' * (i % 40)}" for i in range(20_000)]

    vectors = client.encode(texts)

    assert np.array_equal(vectors, stub_vectors(texts))


def test_prompt_is_prepended_to_each_text(client: Client) -> None:
    vectors = client.encode(["one", "two"], prompt="query: ")

    assert np.array_equal(vectors, stub_vectors(["query: one", "query: two"]))


def test_bytes_are_refused(client: Client) -> None:
    with pytest.raises(ContractError, match="Decode them first"):
        client.encode(b"bytes")  # type: ignore[arg-type] # the mistake under test


@pytest.mark.parametrize("text", ["a text", b"a text"])
@pytest.mark.parametrize("name", ["submit", "stream"])
def test_single_text_is_refused_by_submit_and_stream(name: str, text: Any, client: Client) -> None:
    """A string is iterable, so it would become one text per character."""
    with pytest.raises(ContractError, match=rf"takes many texts, .* list: {name}\(\[text\]\)"):
        getattr(client, name)(text)


def test_invalid_texts_fail_and_the_others_are_embedded(client: Client) -> None:
    invalid = {1: "nul_character", 3: "not_unicode", 4: "text_too_large", 6: "not_a_string"}
    texts = ["a", "x\0y", "b", "\ud800", "x" * (MAX_TEXT_BYTES + 1), "c", 7, "d"]

    with pytest.raises(TextsFailed) as caught:
        client.encode(texts)  # type: ignore[arg-type] # the mistake under test

    good = [i for i in range(len(texts)) if i not in invalid]
    assert caught.value.failures == invalid
    assert np.isnan(caught.value.vectors[list(invalid)]).all()
    assert np.array_equal(caught.value.vectors[good], stub_vectors("abcd"))


def test_text_of_maximum_size_is_embedded(client: Client) -> None:
    largest = "é" * (MAX_TEXT_BYTES // 2)

    vectors = client.encode([largest])

    assert np.array_equal(vectors, stub_vectors([largest]))


def test_on_long_error_fails_a_long_text(client: Client) -> None:
    texts = ["short", "word " * 300]

    with pytest.raises(TextsFailed) as caught:
        client.encode(texts, on_long="error")

    assert caught.value.failures == {1: "too_many_tokens"}


def test_exact_job_is_served(client: Client) -> None:
    vectors = client.encode(["exact"], accuracy="exact")

    assert np.array_equal(vectors, stub_vectors(["exact"]))


def test_wait_publishes_a_batch_whose_publish_failed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"text {i}" for i in range(30)]
    text_batches = [TextBatch(at, 10 * at, texts[10 * at : 10 * at + 10], {}) for at in range(3)]
    job = client.job(text_batches, client.spec())
    publish = Publisher.publish

    def fail(publisher: Publisher, batch: EmbedBatch, *others: Any) -> None:
        if batch.index == 1:
            raise QueueUnavailable("Redis stayed away.")
        publish(publisher, batch, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", fail)
        with pytest.raises(QueueUnavailable):
            job.wait()
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_AFTER_S", 0.1)
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    job.wait(timeout_s=20)

    vectors = [embedded.vector for embedded in job.results()]
    assert np.array_equal(vectors, stub_vectors(texts))


def test_job_survives_an_emptied_redis_with_an_earlier_clock(
    worker: WorkerProcess, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids of stream entries are times of Redis; those of an emptied one may start earlier."""
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    texts = [f"text {i}" for i in range(20)]
    text_batches = [TextBatch(at, 10 * at, texts[10 * at : 10 * at + 10], {}) for at in range(2)]
    with (
        Client(settings=shared_redis.settings(max_in_flight=1)) as client,
        shared_redis.open() as redis,
    ):
        job = client.job(text_batches, client.spec())
        batches = job.batches(timeout_s=20)
        job.start()
        stream = f"embedq:{{{job.id}}}:commits"
        wait_for(lambda: redis.xlen(stream) == 1, "the first commit")
        redis.xadd(stream, {"i": 9, "v": 0}, id="9999999999999-0")
        vectors = [next(batches).vectors]
        wait_for(lambda: redis.xlen(stream) == 1, "the second commit")

        redis.flushdb()

        vectors += [batch.vectors for batch in batches]
    assert np.array_equal(np.concatenate(vectors), stub_vectors(texts))


@pytest.mark.parametrize("method", ["wait", "results", "stream"])
def test_job_whose_texts_raise_never_looks_complete(method: str, client: Client) -> None:

    def texts() -> Iterator[str]:
        yield from (f"text {i}" for i in range(700))
        raise OSError("The database went away.")

    job = client.job(client.split(texts(), client.spec()), client.spec())
    stream = client.stream(texts())

    def read() -> object:
        if method == "wait":
            return job.wait(timeout_s=20)
        return list(job.results() if method == "results" else stream)

    with pytest.raises(OSError, match="went away"):
        read()
    with pytest.raises(ResultExpired, match=r"has ended, .*: The database went away\. Submit"):
        read()


@pytest.mark.parametrize("kind", ["job", "stream"])
def test_failed_job_never_looks_complete(
    kind: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = client.job([TextBatch(0, 0, ["text"], {})], client.spec())
    stream = client.stream(["text"])

    def read() -> list[Any]:
        return list(job.results() if kind == "job" else stream)

    def fail(*_: Any) -> None:
        raise QueueUnavailable("Redis stayed away.")

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", fail)
        with pytest.raises(QueueUnavailable):
            read()

    with pytest.raises(ResultExpired, match=r"with 0 texts returned: Redis stayed away\."):
        read()


def test_batch_returned_during_a_failed_publish_is_not_lost(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The publish of the next batch fails while one is returned; the next wait returns both."""
    texts = [f"text {i}" for i in range(400)]
    text_batches = [TextBatch(at, 10 * at, texts[10 * at : 10 * at + 10], {}) for at in range(40)]
    job = client.job(text_batches, client.spec())
    job.start()
    next_index, publish = job.progress().published, Publisher.publish

    def fail(publisher: Publisher, batch: EmbedBatch, *others: Any) -> None:
        if batch.index == next_index:
            raise QueueUnavailable("Redis stayed away.")
        publish(publisher, batch, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "publish", fail)
        with pytest.raises(QueueUnavailable):
            job.wait()
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_AFTER_S", 0.1)
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    job.wait(timeout_s=20)

    assert np.array_equal([e.vector for e in job.results()], stub_vectors(texts))


@pytest.mark.parametrize("method", ["wait", "results", "stream"])
def test_interrupted_job_never_looks_complete(method: str, client: Client) -> None:

    def texts() -> Iterator[str]:
        yield from (f"text {i}" for i in range(700))
        raise KeyboardInterrupt

    job = client.job(client.split(texts(), client.spec()), client.spec())
    stream = client.stream(texts())

    def read() -> object:
        if method == "wait":
            return job.wait(timeout_s=20)
        return list(job.results() if method == "results" else stream)

    with pytest.raises(KeyboardInterrupt):
        read()
    with pytest.raises(ResultExpired, match=r"has ended, .*: KeyboardInterrupt\. Submit"):
        read()


def test_batch_whose_commit_entry_was_evicted_is_computed_again(
    worker: WorkerProcess, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_AFTER_S", 0.1)
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    with Client(settings=shared_redis.settings()) as client, shared_redis.open() as redis:
        job = client.submit(["one", "two"])
        stream = f"embedq:{{{job.id}}}:commits"
        wait_for(lambda: redis.xlen(stream) == 1, "the commit")
        redis.unlink(stream)

        job.wait(timeout_s=20)

        assert np.array_equal([e.vector for e in job.results()], stub_vectors(["one", "two"]))


def test_closed_client_leaves_no_file_descriptor(
    worker: WorkerProcess, shared_redis: RedisProcess, short_dir: Path
) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))

    for number in range(3):  # a different address each time
        socket = short_dir / f"{number}.sock"
        socket.symlink_to(shared_redis.socket)
        urls = {
            "broker_url": f"redis+socket://{socket}?virtual_host=0",
            "results_url": f"unix://{socket}?db=1",
        }
        with Client(settings=shared_redis.settings(**urls)) as client:
            client.encode(["text"])
    gc.collect()

    # The first client opens two for the life of the process.
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@pytest.mark.parametrize("pipelined", [False, True])
def test_answer_of_an_interrupted_command_is_discarded(
    pipelined: bool, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next command on the connection gets its own answer."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with shared_redis.open() as redis:
        redis.set("key", "value", ex=60)
        client = redis.pipeline(transaction=False) if pipelined else redis
        with monkeypatch.context() as early, pytest.raises(KeyboardInterrupt):
            early.setattr(Redis, "parse_response", interrupt)
            client.xread({"none": "0-0"}, block=500)
            client.execute()

        assert redis.get("key") == b"value"
