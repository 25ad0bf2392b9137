"""A run that was killed goes on: the same bytes, little done twice, nothing mixed up."""

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

#: Texts a second of the slow worker, and texts of a long run: more than a second of work.
SLOW, LONG = "2000", 3_000


@pytest.fixture(scope="module")
def slow_redis() -> Iterator[RedisProcess]:
    """Run a Redis for the slow worker; take `slow` as well."""
    folder = Path(tempfile.mkdtemp(prefix="eq-"))  # short enough for a unix socket
    server = RedisProcess(folder)
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def slow_worker(slow_redis: RedisProcess) -> Iterator[WorkerProcess]:
    """Run a worker that takes its time; take `slow` instead."""
    folder = slow_redis.socket.parent
    with stub_worker(slow_redis, folder, "slow", EMBEDQ_STUB_TEXTS_PER_S=SLOW) as worker:
        yield worker


@pytest.fixture
def slow(slow_worker: WorkerProcess, slow_redis: RedisProcess) -> WorkerProcess:
    """Lend the slow worker with empty queues."""
    delete_jobs(slow_redis)
    return slow_worker


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write two hundred documents."""
    return write_jsonl(tmp_path / "in.jsonl", documents(200))


def expected(source_documents: list[dict[str, Any]]) -> Any:
    """Return the right vectors."""
    return stub_vectors([document["text"] for document in source_documents])


def test_killed_command_goes_on(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    """After three kills at random moments vectors and sidecar are those of an undisturbed run.

    No kill costs more than one window of batches, and Redis forgets the killed jobs.
    """
    source = write_jsonl(tmp_path / "in.jsonl", documents(LONG))
    whole, output = tmp_path / "whole.npy", tmp_path / "out.npy"
    choose = random.Random()
    with Client(settings=slow_redis.settings(**SMALL)) as client:
        embed(client, source, whole)
        work = Work(client, slow)

        for third in range(3):
            child = start(slow_redis, "embed", source, "-o", output)
            least = LONG * third // 3 + choose.randrange(LONG // 6)
            kill_at(child, output, max(safe_rows(output) + 1, least))
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
def test_kill_between_any_two_steps_is_survived(
    ending: str, small: Client, source: Path, tmp_path: Path
) -> None:
    """Whichever fsync, rename or deletion was the last, the same command makes the same output."""
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
    """What shapes the vectors, the split or the reading may not change under an output."""
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
    """Documents that are in the output already may not change; nothing is written then."""
    output = tmp_path / "out.npy"
    embed(small, source, output) if complete else unfinished(small, source, output, step=14)
    before = promise(output)
    assert before.rows > 30
    write_jsonl(source, CHANGES[name](documents(200)))

    with pytest.raises(InputChanged, match="--restart"):
        embed(small, source, output)

    assert promise(output) == before


def promise(output: Path) -> Manifest:
    """Return what the manifest vouches for, whichever job works on it."""
    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    return replace(manifest, job="")


def test_documents_appended_to_an_unfinished_input_are_embedded(
    small: Client, source: Path, tmp_path: Path
) -> None:
    """What is behind the safe rows may change: the output is that of the longer input."""
    output = tmp_path / "out.npy"
    unfinished(small, source, output)
    write_jsonl(source, documents(230))

    summary = embed(small, source, output)

    assert 0 < summary.resumed < 200
    assert np.array_equal(vectors(output), expected(documents(230)))


def test_appending_to_a_complete_input_names_update(
    small: Client, source: Path, tmp_path: Path
) -> None:
    """A finished output is never silently older than its input."""
    output = tmp_path / "out.npy"
    embed(small, source, output)
    write_jsonl(source, documents(201))

    with pytest.raises(InputChanged, match=r"201 documents now and had 200.*--update"):
        embed(small, source, output)


def test_complete_output_is_left_alone(
    small: Client, worker: WorkerProcess, source: Path, tmp_path: Path
) -> None:
    """The same command once more embeds nothing and says so."""
    output, display = tmp_path / "out.npy", RecordedNotes()
    embed(small, source, output)
    before, work = output.stat(), Work(small, worker)

    summary = embed(small, source, output, display=display)

    assert (summary.total, summary.resumed, summary.docs_per_second) == (200, 200, 0.0)
    assert output.stat() == before
    assert work.texts() == 0
    assert display.notes == [f"{output} is already complete; nothing to embed."]


def test_lost_output_is_not_called_complete(small: Client, source: Path, tmp_path: Path) -> None:
    """A manifest without its output is refused with the next step."""
    output = tmp_path / "out.npy"
    embed(small, source, output)
    output.unlink()

    with pytest.raises(InputError, match=r"out\.npy: is missing.*--restart"):
        embed(small, source, output)


def test_cut_output_is_not_called_complete(small: Client, source: Path, tmp_path: Path) -> None:
    """Vectors that something else cut are no finished output, whatever the manifest says."""
    output = tmp_path / "out.npy"
    embed(small, source, output)
    output.write_bytes(output.read_bytes()[:-1])

    with pytest.raises(InputError, match=r"out\.npy: has [0-9,]+ bytes where .*--restart"):
        embed(small, source, output)


def test_restart_starts_over(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    """--restart takes a changed input, a changed setting and a damaged manifest alike."""
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


def test_restart_drops_the_killed_job(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    """What a killed run left in the queue is not computed after a restart."""
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
    """Rows that the manifest vouches for and something else cut are missed."""
    output = tmp_path / "out.npy"
    unfinished(small, source, output)
    path = tmp_path / f"out.npy.{spool}.partial"
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(InputError, match=rf"{spool}\.partial: shorter than.*--restart"):
        embed(small, source, output)


def embedded(client: Client, source: Path, output: Path) -> None:
    """Leave an output as a run does that is killed when every row is in the spools."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "finalize", _killed)
        with pytest.raises(Killed):
            embed(client, source, output)
    assert safe_rows(output) == 200


def _killed(*_: Any) -> None:
    raise Killed


@pytest.mark.parametrize("spool", ["vectors", "items"])
@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_truncated_spool_becomes_no_output(
    ending: str, spool: str, small: Client, source: Path, tmp_path: Path
) -> None:
    """Rows that were cut off after the last of them was embedded are missed just as well."""
    output = tmp_path / f"out.{ending}"
    embedded(small, source, output)
    path = tmp_path / f"out.{ending}.{spool}.partial"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(InputError, match=rf"{spool}\.partial: shorter than.*--restart"):
        embed(small, source, output)

    assert not output.exists()


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_restart_that_is_killed_at_once_leaves_no_empty_output(
    ending: str, small: Client, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spools that --restart has emptied are never taken for those that the old manifest means."""
    output = tmp_path / f"out.{ending}"
    embedded(small, source, output)
    with monkeypatch.context() as patch:
        patch.setattr(Client, "window", _killed)  # the first thing that a run does with open spools
        with pytest.raises(Killed):
            embed(small, source, output, restart=True)

    summary = embed(small, source, output)

    assert (summary.total, summary.resumed) == (200, 0)
    assert np.array_equal([row["vector"] for row in rows(output)], expected(documents(200)))


def test_bad_line_may_be_skipped_after_all(small: Client, tmp_path: Path) -> None:
    """What the error about a bad line advises works: nothing that was embedded is lost."""
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


def test_foreign_file_is_not_overwritten(small: Client, source: Path, tmp_path: Path) -> None:
    """A file that no run of ours made is refused, and replaced only by --restart."""
    output = tmp_path / "out.npy"
    output.write_bytes(b"precious")

    with pytest.raises(InputError, match="exists without a manifest"):
        embed(small, source, output)

    assert output.read_bytes() == b"precious"
    assert embed(small, source, output, restart=True).total == 200


def test_second_command_on_an_output_is_refused(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    """Two runs never write one output, whatever the second wants; the first is not disturbed."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(LONG))
    output = tmp_path / "out.npy"
    first = start(slow_redis, "embed", source, "-o", output)
    wait_for(lambda: safe_rows(output), "the first run to save rows")

    wishes: list[dict[str, Any]] = [{}, {"restart": True}, {"update": True}]
    with Client(settings=slow_redis.settings(**SMALL)) as client:
        for options in wishes:
            with pytest.raises(InputError, match="another embedq is writing this output"):
                embed(client, source, output, **options)
    code, _, stderr = finish(first)

    assert code == 0, stderr
    assert np.array_equal(vectors(output), expected(documents(LONG)))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_says_how_to_go_on(
    number: signal.Signals, slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM end with 130 and one line; nothing is left behind, and it goes on."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(2_000))
    output = tmp_path / "out.npy"
    child = start(slow_redis, "embed", source, "-o", output)
    wait_for(lambda: safe_rows(output), "rows to be saved")

    child.send_signal(number)
    code, stdout, stderr = finish(child)

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


def test_restart_that_is_interrupted_before_it_begins_says_how_to_go_on(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    """The old output is whole still: without --restart it would be called complete."""
    output = tmp_path / "out.npy"
    embed(small, source, output)
    child = start(
        shared_redis, "embed", source, "-o", output, "--restart", EMBEDQ_MODEL="not/there"
    )
    assert child.stderr is not None
    told = child.stderr.readline()  # it waits for a worker with that model

    child.send_signal(signal.SIGINT)
    code, _, stderr = finish(child)

    assert code == 130, told
    assert "are saved; the same command continues." in stderr


def test_interrupted_restart_says_how_to_go_on(
    slow: WorkerProcess, slow_redis: RedisProcess, tmp_path: Path
) -> None:
    """The same command would start over once more; without --restart it goes on."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(2_000))
    output = tmp_path / "out.npy"
    child = start(slow_redis, "embed", source, "-o", output, "--restart")
    wait_for(lambda: safe_rows(output), "rows to be saved")

    child.send_signal(signal.SIGINT)
    code, _, stderr = finish(child)
    saved = safe_rows(output)
    done = command(slow_redis, "embed", source, "-o", output)

    assert code == 130
    assert "are saved; the same command without --restart continues." in stderr
    assert f"{saved:,} resumed" in done[1]


def test_manifest_forgets_its_job_when_complete(
    small: Client, source: Path, tmp_path: Path
) -> None:
    """A finished manifest names no job, so that no later run looks for one."""
    output = tmp_path / "out.npy"

    embed(small, source, output)

    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    assert (manifest.job, manifest.complete, manifest.rows) == ("", True, 200)
