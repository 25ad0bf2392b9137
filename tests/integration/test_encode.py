"""Texts through a real Redis and a real worker, and back."""

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


def test_list_comes_back_in_order(client: Client) -> None:
    """A list gives float32 [n, D], row i for text i, exactly as the stub computes it."""
    vectors = client.encode(TEXTS)

    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, stub_vectors(TEXTS))


def test_single_text_gives_one_vector(client: Client) -> None:
    """A bare string gives [D], not [1, D] and not one row a character."""
    vector = client.encode("only one")

    assert vector.shape == (STUB_DIM,)
    assert np.array_equal(vector, stub_vectors(["only one"])[0])


def test_empty_list_gives_no_rows(client: Client) -> None:
    """An empty list gives [0, D]."""
    vectors = client.encode([])

    assert vectors.shape == (0, STUB_DIM)
    assert vectors.dtype == np.float32


def test_generator_is_read_once(client: Client) -> None:
    """Any iterable is taken as it comes."""
    vectors = client.encode(f"text {i}" for i in range(10))

    assert np.array_equal(vectors, stub_vectors([f"text {i}" for i in range(10)]))


def test_order_holds_over_many_batches(client: Client) -> None:
    """Twenty thousand texts in many batches come back in the caller's order."""
    texts = [f"text {i} {'word ' * (i % 40)}" for i in range(20_000)]

    vectors = client.encode(texts)

    assert np.array_equal(vectors, stub_vectors(texts))


def test_prompt_is_put_before_each_text(client: Client) -> None:
    """A prompt shapes the vector as if it were part of the text."""
    vectors = client.encode(["one", "two"], prompt="query: ")

    assert np.array_equal(vectors, stub_vectors(["query: one", "query: two"]))


def test_bytes_are_refused_with_the_next_step(client: Client) -> None:
    """Bytes are no text, and not a list of numbers either."""
    with pytest.raises(ContractError, match="Decode them first"):
        client.encode(b"bytes")  # type: ignore[arg-type] # the mistake under test


@pytest.mark.parametrize("text", ["a text", b"a text"])
@pytest.mark.parametrize("name", ["submit", "stream"])
def test_one_text_is_not_many(name: str, text: Any, client: Client) -> None:
    """A job of one text by mistake is refused; it would have a vector for each character."""
    with pytest.raises(ContractError, match=rf"takes many texts, .* list: {name}\(\[text\]\)"):
        getattr(client, name)(text)


def test_bad_texts_fail_alone(client: Client) -> None:
    """Each text that cannot be embedded is named with its code; the others have vectors."""
    bad = {1: "nul_character", 3: "not_unicode", 4: "text_too_large", 6: "not_a_string"}
    texts = ["a", "x\0y", "b", "\ud800", "x" * (MAX_TEXT_BYTES + 1), "c", 7, "d"]

    with pytest.raises(TextsFailed) as caught:
        client.encode(texts)  # type: ignore[arg-type] # the mistake under test

    good = [i for i in range(len(texts)) if i not in bad]
    assert caught.value.failures == bad
    assert np.isnan(caught.value.vectors[list(bad)]).all()
    assert np.array_equal(caught.value.vectors[good], stub_vectors("abcd"))


def test_text_of_the_largest_size_is_embedded(client: Client) -> None:
    """Exactly 1 MiB of UTF-8 is allowed, one byte more is not."""
    largest = "é" * (MAX_TEXT_BYTES // 2)

    vectors = client.encode([largest])

    assert np.array_equal(vectors, stub_vectors([largest]))


def test_long_text_may_be_an_error(client: Client) -> None:
    """With on_long="error" a text of more tokens than the model takes fails with its code."""
    texts = ["short", "word " * 300]

    with pytest.raises(TextsFailed) as caught:
        client.encode(texts, on_long="error")

    assert caught.value.failures == {1: "too_many_tokens"}


def test_exact_job_travels_on_the_cpu_queue(client: Client) -> None:
    """The exact class is served by the same worker through embed.cpu."""
    vectors = client.encode(["exact"], accuracy="exact")

    assert np.array_equal(vectors, stub_vectors(["exact"]))


def test_batch_that_was_not_published_is_not_forgotten(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits again after Redis stayed away too long gets every vector."""
    texts = [f"text {i}" for i in range(30)]
    slices = [TextBatch(at, 10 * at, texts[10 * at : 10 * at + 10], {}) for at in range(3)]
    job = client.job(slices, client.spec())
    publish = Publisher.publish

    def stay_away(publisher: Publisher, batch: EmbedBatch, *others: Any) -> None:
        if batch.index == 1:
            raise QueueUnavailable("Redis stayed away.")
        publish(publisher, batch, *others)

    with monkeypatch.context() as away:
        away.setattr(Publisher, "publish", stay_away)
        with pytest.raises(QueueUnavailable):
            job.wait()
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_AFTER_S", 0.1)
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    job.wait(timeout_s=20)

    vectors = [embedded.vector for embedded in job.results()]
    assert np.array_equal(vectors, stub_vectors(texts))


def test_job_survives_a_redis_that_begins_anew_in_the_past(
    worker: WorkerProcess, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries of a stream are numbered by the clock of Redis; an empty one may be behind."""
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    texts = [f"text {i}" for i in range(20)]
    slices = [TextBatch(at, 10 * at, texts[10 * at : 10 * at + 10], {}) for at in range(2)]
    with (
        Client(settings=shared_redis.settings(max_in_flight=1)) as client,
        shared_redis.open() as redis,
    ):
        job = client.job(slices, client.spec())
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


@pytest.mark.parametrize("how", ["wait", "results", "stream"])
def test_texts_that_end_with_an_error_are_not_all_texts(how: str, client: Client) -> None:
    """A caller's generator that raises ends the job; asking again never makes it a shorter one."""

    def texts() -> Iterator[str]:
        yield from (f"text {i}" for i in range(700))
        raise OSError("The database went away.")

    job = client.job(client.split(texts(), client.spec()), client.spec())
    stream = client.stream(texts())

    def read() -> object:
        if how == "wait":
            return job.wait(timeout_s=20)
        return list(job.results() if how == "results" else stream)

    with pytest.raises(OSError, match="went away"):
        read()
    with pytest.raises(ResultExpired, match=r"has ended, .*: The database went away\. Submit"):
        read()


@pytest.mark.parametrize("kind", ["job", "stream"])
def test_job_that_ended_with_an_error_does_not_seem_to_be_done(
    kind: str, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks it for more results gets the reason, not the end of a list that lacks some."""
    job = client.job([TextBatch(0, 0, ["text"], {})], client.spec())
    stream = client.stream(["text"])

    def read() -> list[Any]:
        return list(job.results() if kind == "job" else stream)

    def stay_away(*_: Any) -> None:
        raise QueueUnavailable("Redis stayed away.")

    with monkeypatch.context() as away:
        away.setattr(Publisher, "publish", stay_away)
        with pytest.raises(QueueUnavailable):
            read()

    with pytest.raises(ResultExpired, match=r"with 0 texts returned: Redis stayed away\."):
        read()


def test_batch_in_hand_when_redis_goes_away_is_not_lost(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch cannot be published while one is handed out: both come with the next wait."""
    texts = [f"text {i}" for i in range(400)]
    slices = [TextBatch(at, 10 * at, texts[10 * at : 10 * at + 10], {}) for at in range(40)]
    job = client.job(slices, client.spec())
    job.start()
    first_behind, publish = job.progress().published, Publisher.publish

    def stay_away(publisher: Publisher, batch: EmbedBatch, *others: Any) -> None:
        if batch.index == first_behind:
            raise QueueUnavailable("Redis stayed away.")
        publish(publisher, batch, *others)

    with monkeypatch.context() as away:
        away.setattr(Publisher, "publish", stay_away)
        with pytest.raises(QueueUnavailable):
            job.wait()
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_AFTER_S", 0.1)
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    job.wait(timeout_s=20)

    assert np.array_equal([e.vector for e in job.results()], stub_vectors(texts))


@pytest.mark.parametrize("how", ["wait", "results", "stream"])
def test_interrupted_job_does_not_seem_to_be_done(how: str, client: Client) -> None:
    """Ctrl-C while the caller's texts are pulled ends the job as an error does, not as its end."""

    def texts() -> Iterator[str]:
        yield from (f"text {i}" for i in range(700))
        raise KeyboardInterrupt

    job = client.job(client.split(texts(), client.spec()), client.spec())
    stream = client.stream(texts())

    def read() -> object:
        if how == "wait":
            return job.wait(timeout_s=20)
        return list(job.results() if how == "results" else stream)

    with pytest.raises(KeyboardInterrupt):
        read()
    with pytest.raises(ResultExpired, match=r"has ended, .*: KeyboardInterrupt\. Submit"):
        read()


def test_batch_whose_commit_left_redis_is_computed_again(
    worker: WorkerProcess, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that evicts the stream of commits and keeps the bits hides no batch for ever."""
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_AFTER_S", 0.1)
    monkeypatch.setattr("embedq.jobs.recovery.RECONCILE_EVERY_S", 0.1)
    with Client(settings=shared_redis.settings()) as client, shared_redis.open() as redis:
        job = client.submit(["one", "two"])
        stream = f"embedq:{{{job.id}}}:commits"
        wait_for(lambda: redis.xlen(stream) == 1, "the commit")
        redis.unlink(stream)

        job.wait(timeout_s=20)

        assert np.array_equal([e.vector for e in job.results()], stub_vectors(["one", "two"]))


def test_closed_client_leaves_no_descriptor(
    worker: WorkerProcess, shared_redis: RedisProcess, short_dir: Path
) -> None:
    """A program that opens a client for each of many Redis keeps none of their connections."""
    before = len(list(Path("/proc/self/fd").iterdir()))

    for number in range(3):  # an address of its own for each, as local fleets have
        socket = short_dir / f"{number}.sock"
        socket.symlink_to(shared_redis.socket)
        urls = {
            "broker_url": f"redis+socket://{socket}?virtual_host=0",
            "results_url": f"unix://{socket}?db=1",
        }
        with Client(settings=shared_redis.settings(**urls)) as client:
            client.encode(["text"])
    gc.collect()

    assert (
        len(list(Path("/proc/self/fd").iterdir())) <= before + 2
    )  # what a first client opens for good


@pytest.mark.parametrize("pipelined", [False, True])
def test_interrupted_command_leaves_its_answer_to_no_other(
    pipelined: bool, shared_redis: RedisProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After Ctrl-C the answer that is still to come is not taken for that of the next command."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with shared_redis.open() as redis:
        redis.set("key", "value", ex=60)
        asked = redis.pipeline(transaction=False) if pipelined else redis
        with monkeypatch.context() as early, pytest.raises(KeyboardInterrupt):
            early.setattr(Redis, "parse_response", interrupt)
            asked.xread({"none": "0-0"}, block=500)
            asked.execute()

        assert redis.get("key") == b"value"
