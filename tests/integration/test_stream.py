"""Jobs and streams of the SDK: order, window, cancellation and checkpoints."""

from __future__ import annotations

import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cli import wait_until_redis_is_empty
from tests.support.files import SMALL, Work
from tests.support.redis import DEADLINE_S, RedisProcess, environment, wait_for
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.errors import ContractError, InputError, QueueUnavailable, ResultTimeout
from embedq.jobs.batches import Document
from embedq.jobs.stream import AnyDocument
from embedq.testing import stub_vectors

#: Texts of one batch, and of a full window, of the fixture `small`.
BATCH, WINDOW = SMALL["batch_texts"], SMALL["max_in_flight"] * SMALL["batch_texts"]


def texts(n: int) -> list[str]:
    return [f"text {i}" for i in range(n)]


class CountedReads:
    """An iterable that counts the values read from it."""

    def __init__(self, values: Iterable[object]) -> None:
        self.n_read = 0
        self._values = values

    def __iter__(self) -> Iterator[object]:
        for value in self._values:
            self.n_read += 1
            yield value


def test_job_returns_results_in_order_and_leaves_no_key(
    small: Client, shared_redis: RedisProcess
) -> None:
    job = small.submit(texts(500))

    results = list(job.results())

    assert [result.id for result in results] == list(range(500))
    assert np.array_equal([result.vector for result in results], stub_vectors(texts(500)))
    assert {str(result.outcome.status) for result in results} == {"ok"}
    wait_until_redis_is_empty(shared_redis)


def test_submit_publishes_one_window(small: Client) -> None:
    source = CountedReads(texts(5_000))

    job = small.submit(source)  # type: ignore[arg-type] # any iterable of texts
    progress = job.progress()
    job.cancel()

    assert progress.published == SMALL["max_in_flight"]
    assert source.n_read <= WINDOW + 1  # a batch ends where the next text does not fit
    assert (progress.texts, progress.finished) == (0, False)


def test_progress_counts_returned_results(small: Client) -> None:
    job = small.submit([*texts(90), "bad \0", "long " * 300])

    results = job.results()
    first = next(results)
    during = job.progress()
    rest = list(results)
    after = job.progress()

    assert first.id == 0
    assert len(rest) == 91
    assert (during.finished, during.failed) == (False, 0)
    assert (after.texts, after.failed, after.truncated, after.finished) == (92, 1, 1, True)


def test_results_are_available_after_wait(small: Client) -> None:
    job = small.submit(texts(100))

    progress = job.wait(timeout_s=20)
    results = list(job.results())

    assert (progress.texts, progress.finished) == (100, True)
    assert np.array_equal([result.vector for result in results], stub_vectors(texts(100)))


def test_wait_can_be_repeated_after_a_timeout(redis: RedisProcess, short_dir: Path) -> None:
    with (
        stub_worker(redis, short_dir, EMBEDQ_STUB_TEXTS_PER_S="200") as worker,
        Client(settings=redis.settings(**SMALL)) as client,
    ):
        work = Work(client, worker)
        job = client.submit(texts(200))

        with pytest.raises(ResultTimeout, match=job.id):
            job.wait(timeout_s=0.3)
        progress = job.wait()

        assert (progress.texts, progress.finished) == (200, True)
        results = list(job.results())
        assert np.array_equal([result.vector for result in results], stub_vectors(texts(200)))
        assert work.texts() == 200


def test_cancel_deletes_keys_and_skips_queued_batches(redis: RedisProcess, short_dir: Path) -> None:
    with (
        stub_worker(redis, short_dir, EMBEDQ_STUB_TEXTS_PER_S="100") as worker,
        Client(settings=redis.settings(batch_texts=64, max_in_flight=16)) as client,
    ):
        job = client.submit(texts(2_000))
        wait_for(lambda: worker.lines("batch_done"), "a first batch")

        job.cancel()
        done = len(worker.lines("batch_done"))

        assert job.progress().finished
        assert list(job.results()) == []
        wait_until_redis_is_empty(redis)
        wait_for(
            lambda: len(worker.lines("batch_done")) + len(worker.lines("batch_skipped")) >= 16,
            "the worker to skip the rest",
        )
        assert len(worker.lines("batch_done")) <= done + 1  # the one that was being computed


def test_leaving_the_loop_over_results_cancels_the_job(
    small: Client, shared_redis: RedisProcess
) -> None:
    for result in small.submit(texts(2_000)).results():
        if result.id == 10:
            break

    wait_until_redis_is_empty(shared_redis)


def test_stream_returns_order_and_ids_of_the_documents(small: Client) -> None:
    documents: list[AnyDocument] = [("a", "one"), (7, "two"), Document("c", "three"), "four"]

    results = list(small.stream(documents))

    assert [item.id for item in results] == ["a", 7, "c", 3]
    vectors = [item.vector for item in results]
    assert np.array_equal(vectors, stub_vectors(["one", "two", "three", "four"]))


def test_unordered_stream_returns_each_id_with_its_vector(small: Client) -> None:
    documents = [(f"d{i}", f"text {i}") for i in range(1_000)]

    results = {item.id: item.vector for item in small.stream(documents, ordered=False)}

    assert len(results) == 1_000
    vectors = np.array([results[name] for name, _ in documents])
    assert np.array_equal(vectors, stub_vectors([text for _, text in documents]))


@pytest.mark.parametrize("ordered", [True, False])
def test_stream_reads_at_most_one_window_ahead(ordered: bool, small: Client) -> None:
    """Unordered, results that wait for the reader add a second window."""
    source = CountedReads(texts(5_000))
    ahead = 0

    stream = small.stream(source, ordered=ordered)  # type: ignore[arg-type] # as a generator
    n_read_before = source.n_read
    for n_returned, _ in enumerate(stream, 1):
        ahead = max(ahead, source.n_read - n_returned)

    assert n_read_before == 0
    assert source.n_read == 5_000
    assert ahead <= (1 if ordered else 2) * WINDOW + BATCH + 1


def test_closed_endless_stream_leaves_no_key(small: Client, shared_redis: RedisProcess) -> None:
    def endless() -> Iterator[str]:
        number = 0
        while True:
            number += 1
            yield f"text {number}"

    stream = small.stream(endless())
    first = [next(stream).id for _ in range(100)]
    stream.close()

    assert first == list(range(100))
    wait_until_redis_is_empty(shared_redis)


def test_failed_text_has_a_code_and_no_vector(small: Client) -> None:
    good, bad = small.stream([("good", "text"), ("bad", "\0")])

    assert (good.outcome.status, good.outcome.code) == ("ok", "")
    assert (bad.outcome.status, bad.outcome.code) == ("failed", "nul_character")
    assert np.isnan(bad.vector).all()


def test_id_that_json_cannot_encode_is_refused(small: Client) -> None:
    """Ids are stored in the checkpoint."""
    documents: list[Any] = [("good", "text"), (uuid.uuid4(), "text")]

    with pytest.raises(ContractError, match=r"Document 1 has an id of type UUID; .* Use str\(id\)"):
        list(small.stream(documents))


def test_stream_resumes_after_the_last_commit(
    small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "sink.json"
    stream = small.stream(texts(300), checkpoint=checkpoint)
    seen = [next(stream).id for _ in range(123)]
    stream.commit()
    next(stream)
    stream.close()
    work = Work(small, worker)

    resumed = small.stream(texts(300), checkpoint=checkpoint)
    rest = list(resumed)
    resumed.commit()

    assert seen == list(range(123))
    assert resumed.resumed == 123
    assert [item.id for item in rest] == list(range(123, 300))
    vectors = [item.vector for item in rest]
    assert np.array_equal(vectors, stub_vectors(texts(300)[123:]))
    assert work.texts() == 300 - 123
    assert list(small.stream(texts(300), checkpoint=checkpoint)) == []


#: Streams numbered texts into a file, its sink, with a commit after every 50.
PROGRAM = """
import os, sys
from embedq import Client
sink = open(sys.argv[1], "a")
with Client() as client:
    stream = client.stream((f"text {i}" for i in range(2000)), checkpoint=sys.argv[2])
    sink.truncate(int(open(sys.argv[3]).read()) if os.path.exists(sys.argv[3]) else 0)
    for n, result in enumerate(stream, 1):
        sink.write(f"{result.id} {result.vector.tobytes().hex()}\\n")
        if n % 50 == 0:
            sink.flush(); os.fsync(sink.fileno())
            with open(sys.argv[3] + ".tmp", "w") as out: out.write(str(sink.tell()))
            os.replace(sys.argv[3] + ".tmp", sys.argv[3])
            stream.commit()
sink.close()
"""


def test_killed_program_resumes_at_its_last_commit(redis: RedisProcess, short_dir: Path) -> None:
    sink, checkpoint, safe = (short_dir / name for name in ("sink", "checkpoint", "safe"))
    settings = {
        "EMBEDQ_BROKER_URL": redis.broker_url(),
        "EMBEDQ_RESULTS_URL": redis.results_url(),
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_BATCH_TEXTS": "32",
        "EMBEDQ_MAX_IN_FLIGHT": "4",
    }
    program = [sys.executable, "-c", PROGRAM, str(sink), str(checkpoint), str(safe)]

    with stub_worker(redis, short_dir, EMBEDQ_STUB_TEXTS_PER_S="1500"):
        process = subprocess.Popen(program, env=environment(**settings))
        wait_for(lambda: safe.exists() and int(safe.read_text() or 0) > 500_000, "some commits")
        process.kill()
        assert process.wait() < 0
        n_lines = len(sink.read_text().splitlines())
        resumed = subprocess.run(program, env=environment(**settings), timeout=60)

    assert resumed.returncode == 0
    assert 0 < n_lines < 2000
    lines = [line.split() for line in sink.read_text().splitlines()]
    names = [int(name) for name, _ in lines]
    # A kill between the commits of sink and checkpoint repeats one group of 50.
    assert sorted(set(names)) == list(range(2000))
    assert len(names) <= 2050
    expected = stub_vectors(texts(2000))
    assert all(bytes.fromhex(raw) == expected[int(name)].tobytes() for name, raw in lines)


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        (["other", *texts(99)[1:]], {}, "the first 50 documents differ"),
        (texts(20), {}, "the first 50 documents differ"),
        ([(f"n{i}", text) for i, text in enumerate(texts(99))], {}, "differ from the"),
        (texts(99), {"prompt": "query: "}, "other settings"),
        (texts(99), {"accuracy": "exact"}, "other settings"),
    ],
)
def test_checkpoint_of_other_documents_or_settings_is_refused(
    changed: list[str], options: dict[str, str], reason: str, small: Client, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "sink.json"
    stream = small.stream(texts(99), checkpoint=checkpoint)
    for _ in range(50):
        next(stream)
    stream.commit()
    stream.close()

    with pytest.raises(InputError, match=reason):
        small.stream(changed, checkpoint=checkpoint, **options)  # type: ignore[arg-type] # options are texts


@pytest.mark.parametrize(
    "content", ['{"documents": 3}', '{"documents": "3", "digest": "", "fingerprint": ""}', "{"]
)
def test_damaged_checkpoint_is_refused_and_not_overwritten(
    content: str, small: Client, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "sink.json"
    checkpoint.write_text(content)

    with pytest.raises(InputError, match="is not a readable checkpoint"):
        small.stream(texts(5), checkpoint=checkpoint)

    assert checkpoint.read_text() == content


def test_checkpoint_needs_an_ordered_stream(small: Client, tmp_path: Path) -> None:
    """A checkpoint is a count of documents."""
    with pytest.raises(InputError, match="ordered=True"):
        small.stream(texts(5), ordered=False, checkpoint=tmp_path / "sink.json")
    with pytest.raises(InputError, match="checkpoint='PATH'"):
        small.stream(texts(5)).commit()


def test_wait_and_cancel_return_without_redis(redis: RedisProcess, short_dir: Path) -> None:
    """The timeout of the call applies, not the longer one of the job."""
    with stub_worker(redis, short_dir), Client(settings=redis.settings(**SMALL)) as client:
        job = client.submit(texts(5_000))
        redis.stop()
        started = time.monotonic()

        with pytest.raises(QueueUnavailable):
            job.wait(timeout_s=0.5)
        job.cancel()

        assert time.monotonic() - started < DEADLINE_S


def test_failed_submit_leaves_no_key(small: Client, shared_redis: RedisProcess) -> None:
    """The caller has no Job to cancel."""

    def failing() -> Iterator[str]:
        yield from texts(2 * BATCH)
        raise OSError("The database went away.")

    with pytest.raises(OSError, match="went away"):
        small.submit(failing())

    wait_until_redis_is_empty(shared_redis)
