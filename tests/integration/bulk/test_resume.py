"""An interrupted `embedq embed` resumes and makes the same output as an uninterrupted run."""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cli import command, finish, kill_at, start, wait_until_redis_is_empty
from tests.support.files import (
    SMALL,
    Killed,
    RecordedNotes,
    Work,
    documents,
    embed,
    files_beside,
    items,
    killed_at_step,
    rows,
    safe_rows,
    unfinished,
    vectors,
    write_jsonl,
)
from tests.support.redis import RedisProcess, delete_jobs, wait_for
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.bulk import writers
from embedq.bulk.checkpoint import InputChanged, Manifest, manifest_path
from embedq.bulk.writers import sidecar_path
from embedq.errors import InputError
from embedq.testing import stub_vectors

#: Texts per second of the slow worker; texts of a run that takes it more than a second.
SLOW, LONG = "2000", 3_000


@pytest.fixture(scope="module")
def slow_redis() -> Iterator[RedisProcess]:
    """Run a Redis for the slow worker. Tests use the fixture `slow` as well."""
    folder = Path(tempfile.mkdtemp(prefix="eq-"))  # short enough for a unix socket
    server = RedisProcess(folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def slow_worker(slow_redis: RedisProcess) -> Iterator[WorkerProcess]:
    """Run a slow worker. Tests use the fixture `slow`."""
    folder = slow_redis.socket.parent
    with stub_worker(slow_redis, folder, "slow", EMBEDQ_STUB_TEXTS_PER_S=SLOW) as worker:
        yield worker


@pytest.fixture
def slow(slow_worker: WorkerProcess, slow_redis: RedisProcess) -> WorkerProcess:
    """Return the slow worker after emptying Redis."""
    delete_jobs(slow_redis)
    return slow_worker


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", documents(200))


def expected(source_documents: list[dict[str, Any]]) -> Any:
    return stub_vectors([document["text"] for document in source_documents])


def test_killed_command_resumes(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    """After three kills the output is bit-identical; each kill repeats at most one window."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(LONG))
    whole, output = tmp_path / "whole.npy", tmp_path / "out.npy"
    choose = random.Random()
    with Client(settings=slow_redis.settings(**SMALL)) as client:
        embed(client, source, whole)
        work = Work(client, slow)

        for third in range(3):
            process = start(slow_redis, "embed", source, "-o", output)
            least = LONG * third // 3 + choose.randrange(LONG // 6)
            kill_at(process, output, max(safe_rows(output) + 1, least))
        code, _, stderr = command(slow_redis, "embed", source, "-o", output)
        n_computed = work.texts()

    assert code == 0, stderr
    assert output.read_bytes() == whole.read_bytes()
    assert sidecar_path(output).read_bytes() == sidecar_path(whole).read_bytes()
    window = SMALL["max_in_flight"] * SMALL["batch_texts"]
    assert LONG <= n_computed <= LONG + 3 * window
    wait_until_redis_is_empty(slow_redis)
    done = {"in.jsonl", "whole.npy", "whole.items.jsonl", "whole.npy.embedq.json"}
    assert files_beside(output) == done | {"out.npy", "out.items.jsonl", "out.npy.embedq.json"}


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_run_killed_before_any_file_operation_can_be_resumed(
    ending: str, small: Client, source: Path, tmp_path: Path
) -> None:
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    write_jsonl(source, documents(70))
    whole = tmp_path / f"whole.{ending}"
    embed(small, source, whole)

    for step in range(1, 1000):
        folder = tmp_path / str(step)
        folder.mkdir()
        output = folder / f"out.{ending}"
        with killed_at_step(step):
            try:
                embed(small, source, output)
                break
            except Killed:
                pass
        summary = embed(small, source, output)
        assert summary.total == summary.ok == 70, step
        assert rows(output) == rows(whole), step
        assert not {name for name in files_beside(output) if "partial" in name}, step

    assert step > 20


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("accuracy", {"accuracy": "exact"}, {}),
        ("on_long", {"on_long": "error"}, {}),
        ("prompt", {}, {"prompt": "query: "}),
        ("batch_texts", {"batch_texts": 16}, {}),
        ("batch_tokens", {"batch_tokens": 5000}, {}),
        ("id_field", {}, {"fields": "text"}),
        ("files", {}, {"inputs": "other"}),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_changed_setting_is_refused_by_name(
    name: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    complete: bool,
    small: Client,
    shared_redis: RedisProcess,
    source: Path,
    tmp_path: Path,
) -> None:
    """A setting that affects vectors, batches or reading may not change between two runs."""
    output = tmp_path / "out.npy"
    embed(small, source, output) if complete else unfinished(small, source, output)
    before = manifest_path(output).read_bytes()
    if "fields" in options:
        options = {"fields": _fields("other")}
    if "inputs" in options:
        options = {}
        source = write_jsonl(tmp_path / "other.jsonl", documents(200))

    with (
        Client(settings=shared_redis.settings(**{**SMALL, **settings})) as other,
        pytest.raises(InputChanged, match=rf"started with (setting|input) {name} = .*--restart"),
    ):
        embed(other, source, output, **options)

    assert manifest_path(output).read_bytes() == before


def _fields(name: str) -> Any:
    from embedq.bulk.readers import Fields

    return Fields(id=name)


CHANGES: dict[str, Any] = {
    "edited": lambda found: [{**found[0], "text": "another"}, *found[1:]],
    "renamed": lambda found: [{**found[0], "id": "another"}, *found[1:]],
    "swapped": lambda found: [found[1], found[0], *found[2:]],
    "inserted": lambda found: [{"id": "n", "text": "n"}, *found],
    "removed": lambda found: found[1:],
    "shortened": lambda found: found[:30],
    "emptied": lambda found: [],
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("complete", [False, True])
def test_changed_input_is_refused(
    name: str, complete: bool, small: Client, source: Path, tmp_path: Path
) -> None:
    """Documents that are in the output may not change; the output is not modified."""
    output = tmp_path / "out.npy"
    embed(small, source, output) if complete else unfinished(small, source, output, step=14)
    before = manifest_without_job(output)
    assert before.rows > 30
    write_jsonl(source, CHANGES[name](documents(200)))

    with pytest.raises(InputChanged, match="--restart"):
        embed(small, source, output)

    assert manifest_without_job(output) == before


def manifest_without_job(output: Path) -> Manifest:
    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    return replace(manifest, job="")


def test_documents_appended_to_an_unfinished_input_are_embedded(
    small: Client, source: Path, tmp_path: Path
) -> None:
    """Documents after the last confirmed row may change."""
    output = tmp_path / "out.npy"
    unfinished(small, source, output)
    write_jsonl(source, documents(230))

    summary = embed(small, source, output)

    assert 0 < summary.resumed < 200
    assert np.array_equal(vectors(output), expected(documents(230)))


def test_longer_input_of_a_complete_output_is_refused(
    small: Client, source: Path, tmp_path: Path
) -> None:
    """The error names `--update`."""
    output = tmp_path / "out.npy"
    embed(small, source, output)
    write_jsonl(source, documents(201))

    with pytest.raises(InputChanged, match=r"201 documents now and had 200.*--update"):
        embed(small, source, output)


def test_complete_output_is_not_computed_again(
    small: Client, worker: WorkerProcess, source: Path, tmp_path: Path
) -> None:
    output, display = tmp_path / "out.npy", RecordedNotes()
    embed(small, source, output)
    before, work = output.stat(), Work(small, worker)

    summary = embed(small, source, output, display=display)

    assert (summary.total, summary.resumed, summary.docs_per_second) == (200, 200, 0.0)
    assert output.stat() == before
    assert work.texts() == 0
    assert display.notes == [f"{output} is already complete; nothing to embed."]


def test_manifest_without_its_output_is_refused(
    small: Client, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    embed(small, source, output)
    output.unlink()

    with pytest.raises(InputError, match=r"out\.npy: is missing.*--restart"):
        embed(small, source, output)


def test_truncated_output_is_refused(small: Client, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    embed(small, source, output)
    output.write_bytes(output.read_bytes()[:-1])

    with pytest.raises(InputError, match=r"out\.npy: has [0-9,]+ bytes where .*--restart"):
        embed(small, source, output)


def test_restart_replaces_the_output(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    """--restart accepts a changed input, a changed setting and a damaged manifest."""
    output = tmp_path / "out.npy"
    unfinished(small, source, output)
    write_jsonl(source, documents(50))

    first = embed(small, source, output, restart=True)
    manifest_path(output).write_text("{")
    with Client(settings=shared_redis.settings(batch_texts=16)) as other:
        second = embed(other, source, output, restart=True)

    assert (first.total, first.resumed, second.total, second.resumed) == (50, 0, 50, 0)
    assert np.array_equal(vectors(output), expected(documents(50)))
    assert len(items(output)) == 50


def test_restart_cancels_the_killed_job(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", documents(LONG))
    output = tmp_path / "out.npy"
    kill_at(start(slow_redis, "embed", source, "-o", output), output, 1)
    write_jsonl(source, documents(10))

    code, _, stderr = command(slow_redis, "embed", source, "-o", output, "--restart")

    assert code == 0, stderr
    wait_until_redis_is_empty(slow_redis)
    assert len(items(output)) == 10


@pytest.mark.parametrize("spool", ["vectors", "items"])
def test_truncated_spool_is_refused(
    spool: str, small: Client, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    unfinished(small, source, output)
    path = tmp_path / f"out.npy.{spool}.partial"
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(InputError, match=rf"{spool}\.partial: shorter than.*--restart"):
        embed(small, source, output)


def interrupt_before_finalize(client: Client, source: Path, output: Path) -> None:
    """Leave the spools of a run that was killed when they contained every row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "finalize", _killed)
        with pytest.raises(Killed):
            embed(client, source, output)
    assert safe_rows(output) == 200


def _killed(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize("spool", ["vectors", "items"])
@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_truncated_spool_of_a_finished_run_is_refused(
    ending: str, spool: str, small: Client, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / f"out.{ending}"
    interrupt_before_finalize(small, source, output)
    path = tmp_path / f"out.{ending}.{spool}.partial"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(InputError, match=rf"{spool}\.partial: shorter than.*--restart"):
        embed(small, source, output)

    assert not output.exists()


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_output_is_computed_after_a_restart_was_killed_at_once(
    ending: str, small: Client, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest of the first run does not apply to spools that --restart has emptied."""
    output = tmp_path / f"out.{ending}"
    interrupt_before_finalize(small, source, output)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "window", _killed)  # called first after the spools are open
        with pytest.raises(Killed):
            embed(small, source, output, restart=True)

    summary = embed(small, source, output)

    assert (summary.total, summary.resumed) == (200, 0)
    assert np.array_equal([row["vector"] for row in rows(output)], expected(documents(200)))


def test_run_that_failed_on_a_bad_line_resumes_with_skip(small: Client, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, documents(2_000))
    with source.open("a") as lines:
        lines.write("broken\n")
    with pytest.raises(InputError, match="--on-bad-line skip"):
        embed(small, source, output)

    summary = embed(small, source, output, skip_bad_lines=True)

    assert (summary.total, summary.skipped_lines) == (2_000, 1)
    assert summary.resumed > 0
    assert np.array_equal(vectors(output), expected(documents(2_000)))


def test_file_of_another_program_is_not_overwritten(
    small: Client, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    output.write_bytes(b"precious")

    with pytest.raises(InputError, match="exists without a manifest"):
        embed(small, source, output)

    assert output.read_bytes() == b"precious"
    assert embed(small, source, output, restart=True).total == 200


def test_concurrent_command_for_an_output_is_refused(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", documents(LONG))
    output = tmp_path / "out.npy"
    first = start(slow_redis, "embed", source, "-o", output)
    wait_for(lambda: safe_rows(output), "the first run to save rows")

    commands: list[dict[str, Any]] = [{}, {"restart": True}, {"update": True}]
    with Client(settings=slow_redis.settings(**SMALL)) as client:
        for options in commands:
            with pytest.raises(InputError, match="another embedq is writing this output"):
                embed(client, source, output, **options)
    code, _, stderr = finish(first)

    assert code == 0, stderr
    assert np.array_equal(vectors(output), expected(documents(LONG)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_names_the_next_step(
    number: signal.Signals, slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", documents(2_000))
    output = tmp_path / "out.npy"
    process = start(slow_redis, "embed", source, "-o", output)
    wait_for(lambda: safe_rows(output), "rows to be saved")

    process.send_signal(number)
    code, stdout, stderr = finish(process)

    assert (code, stdout) == (130, "")
    sentence = (
        f"embedq: interrupted. The rows of {output} so far are saved; the same command continues."
    )
    assert stderr.splitlines() == [sentence]
    wait_until_redis_is_empty(slow_redis)
    saved = safe_rows(output)
    code, stdout, _ = command(slow_redis, "embed", source, "-o", output)
    assert code == 0
    assert f"{saved:,} resumed" in stdout
    assert np.array_equal(vectors(output), expected(documents(2_000)))


def test_restart_interrupted_before_its_first_batch_names_the_next_step(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    """The old output is still complete, so the command must be repeated with --restart."""
    output = tmp_path / "out.npy"
    embed(small, source, output)
    process = start(
        shared_redis, "embed", source, "-o", output, "--restart", EMBEDQ_MODEL="not/there"
    )
    assert process.stderr is not None
    notice = process.stderr.readline()  # it waits for a worker with that model

    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)

    assert code == 130, notice
    assert "are saved; the same command continues." in stderr


def test_interrupted_restart_names_the_command_without_restart(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", documents(2_000))
    output = tmp_path / "out.npy"
    process = start(slow_redis, "embed", source, "-o", output, "--restart")
    wait_for(lambda: safe_rows(output), "rows to be saved")

    process.send_signal(signal.SIGINT)
    code, _, stderr = finish(process)
    saved = safe_rows(output)
    done = command(slow_redis, "embed", source, "-o", output)

    assert code == 130
    assert "are saved; the same command without --restart continues." in stderr
    assert f"{saved:,} resumed" in done[1]


def test_complete_manifest_names_no_job(small: Client, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"

    embed(small, source, output)

    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    assert (manifest.job, manifest.complete, manifest.rows) == ("", True, 200)
