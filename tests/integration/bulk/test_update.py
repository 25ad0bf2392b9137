"""--update: what is unchanged is kept byte for byte, the rest is embedded, the counts are right."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cli import Command, command, kill_at, one_line, start, wait_until_redis_is_empty
from tests.support.files import (
    SMALL,
    Documents,
    Killed,
    Work,
    documents,
    embed,
    files_beside,
    items,
    killed_at_step,
    rows,
    vectors,
    write_jsonl,
)
from tests.support.redis import RedisProcess
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.bulk.checkpoint import InputChanged, Manifest, manifest_path
from embedq.bulk.readers import Fields
from embedq.bulk.writers import sidecar_path
from embedq.errors import InputError
from embedq.testing import stub_vectors

#: Descriptor of the pipe that is an input; bash begins with it, too.
PIPE = 63


def changed(before: Documents) -> tuple[Documents, dict[str, int]]:
    """Return the documents with some new, changed and removed and all in another order."""
    after = [document for at, document in enumerate(before) if at % 10]
    for document in after[::7]:
        document["text"] += " changed"
    n_changed = len(after[::7])
    after += [{"id": f"new{i}", "text": f"new {i}"} for i in range(13)]
    random.Random(1).shuffle(after)
    counts = {"new": 13, "changed": n_changed, "removed": len(before[::10])}
    return after, {**counts, "kept": len(after) - 13 - n_changed}


def comparable(found: Documents) -> Documents:
    """Make ids comparable: Parquet keeps them as text."""
    return [{**item, "id": str(item["id"])} for item in found]


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_updated_output_is_that_of_a_fresh_run(
    ending: str, small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    """New, changed, removed and reordered documents: rows and items equal those made from nothing.

    Only new and changed texts reach a worker.
    """
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    source = write_jsonl(tmp_path / "in.jsonl", documents(300))
    output, fresh = tmp_path / f"out.{ending}", tmp_path / f"fresh.{ending}"
    embed(small, source, output)
    after, counts = changed(documents(300))
    write_jsonl(source, after)
    work = Work(small, worker)

    summary = embed(small, source, output, update=True)

    assert work.texts() == counts["new"] + counts["changed"]
    assert summary.updated == counts
    assert (summary.total, summary.ok) == (len(after), len(after))
    embed(small, source, fresh)
    assert rows(output) == rows(fresh)
    assert embed(small, source, output).resumed == len(after)  # a run without --update agrees


def test_unchanged_rows_are_not_computed_again(
    small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    """An update without changes embeds nothing and changes no byte."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(100))
    output = tmp_path / "out.npy"
    embed(small, source, output)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    work = Work(small, worker)

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 0, "changed": 0, "kept": 100, "removed": 0}
    assert work.texts() == 0
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in after if after[name] != before.get(name)} <= {"out.npy.embedq.json"}
    assert after.keys() == before.keys()


def test_kept_vectors_are_the_old_bytes(small: Client, tmp_path: Path) -> None:
    """A kept row is copied, not computed: a mark made in it by hand is still there."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(50))
    output = tmp_path / "out.npy"
    embed(small, source, output)
    marked = vectors(output)
    marked[7] = 7.0
    np.save(output, marked)
    write_jsonl(source, [{"id": "first", "text": "first"}, *documents(50)])

    embed(small, source, output, update=True)

    assert np.array_equal(vectors(output)[1:], marked)


def test_lines_without_ids_are_known_by_their_text(
    small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    """A text that moved to another line is kept and has the number of its line as its id."""
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("".join(f"line {i}\n" for i in range(100)))
    embed(small, source, output)
    lines = ["new", *(f"line {i}" for i in range(99, 10, -1)), "line 3 changed"]
    source.write_text("".join(f"{line}\n" for line in lines))
    work = Work(small, worker)

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 2, "changed": 0, "kept": 89, "removed": 11}
    assert work.texts() == 2
    assert np.array_equal(vectors(output), stub_vectors(lines))
    assert [item["id"] for item in items(output)] == list(range(1, 92))
    assert [item["row"] for item in items(output)] == list(range(91))


DUPLICATES: dict[str, tuple[list[str], list[str], dict[str, int]]] = {
    "as many": (["a", "a", "b"], ["a", "b", "a"], {"kept": 3}),
    "more": (["a", "b"], ["a", "a", "a"], {"kept": 3, "removed": 1}),
    "fewer": (["a", "a", "a"], ["a"], {"kept": 1, "removed": 2}),
    "empty": (["", "", "x"], ["", "x", ""], {"kept": 3}),
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_equal_lines_are_counted_one_by_one(name: str, small: Client, tmp_path: Path) -> None:
    """Equal texts without ids are matched row by row, and share a row when there are too few."""
    before, after, counts = DUPLICATES[name]
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("".join(f"{line}\n" for line in before))
    embed(small, source, output)
    source.write_text("".join(f"{line}\n" for line in after))

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 0, "changed": 0, "kept": 0, "removed": 0, **counts}
    assert np.array_equal(vectors(output), stub_vectors(after))


def test_documents_of_one_id_are_counted_one_by_one(small: Client, tmp_path: Path) -> None:
    """An id that is there twice: each document has its own vector, and no count goes below zero."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, [{"id": "a", "text": "one"}, {"id": "b", "text": "b"}])
    embed(small, source, output)
    texts = ["two", "three", "one"]
    write_jsonl(source, [{"id": "a", "text": text} for text in texts])

    summary = embed(small, source, output, update=True)

    assert summary.updated is not None
    assert min(summary.updated.values()) >= 0
    assert (summary.updated["kept"], summary.updated["removed"]) == (1, 1)
    assert np.array_equal(vectors(output), stub_vectors(texts))


def test_same_text_under_another_id_is_new(small: Client, tmp_path: Path) -> None:
    """By id and text: a document that only looks like another is not taken for it."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, [{"id": 1, "text": "same"}])
    embed(small, source, output)
    write_jsonl(source, [{"id": 2, "text": "same"}])

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 1, "changed": 0, "kept": 0, "removed": 1}
    assert [item["id"] for item in items(output)] == [2]


def test_failed_text_is_tried_again(small: Client, tmp_path: Path) -> None:
    """A row without a vector is never kept, and fails again if nothing mended it."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, [{"id": "a", "text": "x\0y"}, {"id": "b", "text": "b\0"}])
    embed(small, source, output)
    write_jsonl(source, [{"id": "a", "text": "mended"}, {"id": "b", "text": "b\0"}])

    summary = embed(small, source, output, update=True)

    assert (summary.ok, summary.failed) == (1, 1)
    assert summary.updated == {"new": 0, "changed": 2, "kept": 0, "removed": 0}
    assert np.array_equal(vectors(output)[:1], stub_vectors(["mended"]))
    assert np.isnan(vectors(output)[1]).all()


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_everything_may_go_and_come_back(ending: str, small: Client, tmp_path: Path) -> None:
    """An output is updated to nothing, and from nothing to something."""
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    source, output = tmp_path / "in.jsonl", tmp_path / f"out.{ending}"
    write_jsonl(source, documents(20))
    embed(small, source, output)
    whole = rows(output)

    source.write_text("")
    gone = embed(small, source, output, update=True)
    n_left = len(rows(output))
    write_jsonl(source, documents(20))
    back = embed(small, source, output, update=True)

    assert (gone.total, n_left) == (0, 0)
    assert gone.updated == {"new": 0, "changed": 0, "kept": 0, "removed": 20}
    assert back.updated == {"new": 20, "changed": 0, "kept": 0, "removed": 0}
    assert rows(output) == whole


def test_ids_that_are_no_utf8_are_matched(small: Client, tmp_path: Path) -> None:
    """Half of a surrogate pair in an id, or a byte that is no UTF-8, survives an update."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [{"id": "\ud800", "text": "a"}, {"id": "é🦀", "text": "b"}])
    embed(small, source, output)

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 0, "changed": 0, "kept": 2, "removed": 0}
    assert [row["id"] for row in rows(output)] == ["\ud800", "é🦀"]


def test_other_files_and_fields_may_be_given(small: Client, tmp_path: Path) -> None:
    """The input may move: names of files and fields are not part of what is compared."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, documents(40))
    embed(small, source, output)
    part = "".join(f'{d["id"]},"{d["text"]}"\n' for d in documents(40))
    (tmp_path / "other.csv").write_text("key,body\n" + part)

    summary = embed(
        small,
        [str(tmp_path / "*.csv")],
        output,
        update=True,
        fields=Fields(id="key", text="body"),
    )

    assert summary.updated == {"new": 0, "changed": 0, "kept": 40, "removed": 0}


@pytest.mark.parametrize(
    ("name", "settings", "options"),
    [
        ("accuracy", {"accuracy": "exact"}, {}),
        ("on_long", {"on_long": "error"}, {}),
        ("prompt", {}, {"prompt": "query: "}),
    ],
)
def test_update_with_other_settings_is_refused(
    name: str,
    settings: dict[str, Any],
    options: dict[str, Any],
    small: Client,
    shared_redis: RedisProcess,
    tmp_path: Path,
) -> None:
    """Vectors of two settings never meet in one output; it stays as it was."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(20))
    output = tmp_path / "out.npy"
    embed(small, source, output)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    with (
        Client(settings=shared_redis.settings(**{**SMALL, **settings})) as other,
        pytest.raises(InputChanged, match=f"started with setting {name} = "),
    ):
        embed(other, source, output, update=True, **options)

    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_update_needs_a_finished_output(small: Client, tmp_path: Path) -> None:
    """Without an output, or with an unfinished one, the next step is the command itself."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(100))
    output = tmp_path / "out.npy"

    with pytest.raises(InputError, match="no finished output to update"):
        embed(small, source, output, update=True)
    with killed_at_step(10), pytest.raises(Killed):
        embed(small, source, output)
    with pytest.raises(InputError, match="no finished output to update"):
        embed(small, source, output, update=True)

    assert embed(small, source, output).total == 100


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_changed_output_is_refused(ending: str, small: Client, tmp_path: Path) -> None:
    """An output that something else rewrote is not mixed with new rows."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(5))
    output = tmp_path / f"out.{ending}"
    embed(small, source, output)
    if ending == "npy":
        np.save(output, vectors(output)[:3])
    else:
        write_jsonl(output, [{**row, "vector": [1.0, 2.0]} for row in rows(output)])

    with pytest.raises(InputError, match="--restart"):
        embed(small, source, output, update=True)


DAMAGE: dict[str, Callable[[str], str]] = {
    "cut": lambda text: text[:-30],
    "twice": lambda text: text.splitlines(keepends=True)[0] + text,
    "of another program": lambda text: text.replace("text_hash", "digest"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_sidecar_is_refused(name: str, small: Client, tmp_path: Path) -> None:
    """Items that something else spoiled are one sentence with the next step."""
    source = write_jsonl(tmp_path / "in.jsonl", documents(5))
    output = tmp_path / "out.npy"
    embed(small, source, output)
    path = sidecar_path(output)
    path.write_text(DAMAGE[name](path.read_text()))

    with pytest.raises(InputError, match=r"items\.jsonl: lacks the format.*--restart"):
        embed(small, source, output, update=True)


@pytest.mark.parametrize("spare_kib", [60, 600, 1000])
def test_update_on_a_full_disk_keeps_what_is_written(spare_kib: int, command: Command) -> None:
    """Whatever it is that fills the disk, an update says so; with more space it goes on."""
    disk = command.folder / "disk"
    disk.mkdir()
    source = command.write("in.txt", *(f"text {i}" for i in range(3000)))
    assert command("embed", source, "-o", "out.npy").returncode == 0
    texts = [f"text {i}" for i in range(500, 3500)]
    command.write("in.txt", *texts)
    made = list(command.folder.glob("out.*"))
    size_kib = sum(path.stat().st_size for path in made) // 1024 + spare_kib
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "tmpfs", os.fspath(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk of its own needs root and the right to mount")
    try:
        for path in made:
            shutil.copy(path, disk)
        full = command("embed", source, "-o", "disk/out.npy", "--update")
        subprocess.run(["mount", "-o", "remount,size=90m", os.fspath(disk)], check=True)
        done = command("embed", source, "-o", "disk/out.npy", "--update")
        found = vectors(disk / "out.npy")
    finally:
        subprocess.run(["umount", "-l", os.fspath(disk)], check=True)

    assert full.returncode == 3
    assert "the disk is full" in one_line(full)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(found, stub_vectors(texts))


@pytest.mark.parametrize("ending", ["npy", "jsonl"])
def test_kill_between_any_two_steps_of_an_update_is_survived(
    ending: str, small: Client, tmp_path: Path
) -> None:
    """Old and new rows never mix, wherever an update is killed: run again, it is right."""
    before = write_jsonl(tmp_path / "before.jsonl", documents(40))
    after = write_jsonl(tmp_path / "after.jsonl", changed(documents(40))[0])
    whole, finished = tmp_path / f"whole.{ending}", tmp_path / "finished"
    finished.mkdir()
    embed(small, before, finished / f"out.{ending}")
    embed(small, after, whole)

    for step in range(1, 1000):
        output = shutil.copytree(finished, tmp_path / str(step)) / f"out.{ending}"
        with killed_at_step(step):
            try:
                embed(small, after, output, update=True)
                break
            except Killed:
                pass
        summary = embed(small, after, output, update=True)
        assert rows(output) == rows(whole), step
        assert summary.updated is not None
        assert summary.total == 49, step
        left = {name for name in files_beside(output) if "partial" in name or "update" in name}
        assert not left, step

    assert step > 20


def test_killed_update_that_only_removes_is_survived(small: Client, tmp_path: Path) -> None:
    """Without a text to embed, too, every kill leaves something that the same command ends."""
    before = write_jsonl(tmp_path / "before.jsonl", documents(40))
    after = write_jsonl(tmp_path / "after.jsonl", documents(40)[::2])
    finished = tmp_path / "finished"
    finished.mkdir()
    embed(small, before, finished / "out.npy")

    for step in range(1, 1000):
        output = shutil.copytree(finished, tmp_path / str(step)) / "out.npy"
        with killed_at_step(step):
            try:
                embed(small, after, output, update=True)
                break
            except Killed:
                pass
        assert embed(small, after, output, update=True).total == 20, step
        assert [item["id"] for item in items(output)] == [d["id"] for d in documents(40)[::2]], step
        assert not {name for name in files_beside(output) if "update" in name}, step

    assert step > 20


def test_killed_update_of_a_glob_is_survived(small: Client, tmp_path: Path) -> None:
    """What a killed update leaves beside the output is no input of the next one."""
    finished = tmp_path / "finished"
    finished.mkdir()
    write_jsonl(finished / "a.jsonl", documents(40)[:20])
    embed(small, [os.fspath(finished / "*.jsonl")], finished / "out.npy")

    for step in range(1, 1000):
        folder = shutil.copytree(finished, tmp_path / str(step))
        write_jsonl(folder / "b.jsonl", documents(40)[20:])
        inputs = [os.fspath(folder / "*.jsonl")]
        with killed_at_step(step):
            try:
                embed(small, inputs, folder / "out.npy", update=True)
                break
            except Killed:
                pass
        assert embed(small, inputs, folder / "out.npy", update=True).total == 40, step

    assert step > 20


def piped(text: str) -> Iterator[list[str]]:
    """Yield the name of a pipe that holds a text, as `<(command)` gives one; always the same."""
    source, sink = os.pipe()
    os.write(sink, text.encode())
    os.close(sink)
    os.dup2(source, PIPE)
    os.close(source)
    yield [f"/dev/fd/{PIPE}"]
    os.close(PIPE)


def test_killed_update_from_a_pipe_loses_nothing(small: Client, tmp_path: Path) -> None:
    """What can be read only once is read once: the update is right, or refused and then right."""
    source, finished = tmp_path / "in.txt", tmp_path / "finished"
    source.write_text("".join(f"line {i}\n" for i in range(60)))
    after = [f"line {i}" for i in range(10, 80)]
    text = "".join(f"{line}\n" for line in after)
    finished.mkdir()
    embed(small, source, finished / "out.npy")
    refused = 0

    for step in range(1, 1000):
        output = shutil.copytree(finished, tmp_path / str(step)) / "out.npy"
        with killed_at_step(step):
            try:
                for pipe in piped(text):
                    embed(small, pipe, output, update=True, format="txt")
                break
            except Killed:
                pass
        for _ in range(2):
            try:
                for pipe in piped(text):
                    embed(small, pipe, output, update=True, format="txt")
                break
            except InputError as error:
                assert "run the same command again" in str(error), step
                refused += 1
        assert np.array_equal(vectors(output), stub_vectors(after)), step

    assert refused > 0


def test_killed_update_goes_on(redis: RedisProcess, short_dir: Path, tmp_path: Path) -> None:
    """After kill -9 in its middle an update embeds at most one window twice and leaves no trace."""
    before = write_jsonl(tmp_path / "before.jsonl", documents(500))
    after = [*documents(500)[::2], *({"id": f"n{i}", "text": f"new {i}"} for i in range(2000))]
    source = write_jsonl(tmp_path / "after.jsonl", after)
    output = tmp_path / "out.npy"
    with stub_worker(redis, short_dir, "slow", EMBEDQ_STUB_TEXTS_PER_S="2000") as slow:
        with Client(settings=redis.settings(**SMALL)) as client:
            embed(client, before, output)
            work = Work(client, slow)
            update = ("embed", source, "-o", output, "--update", "--json")

            delta = output.with_name("out.npy.update.npy")
            safe = kill_at(start(redis, *update), delta, 500)
            code, stdout, stderr = command(redis, *update)

            assert code == 0, stderr
            counts = {"new": 2000, "changed": 0, "kept": 250, "removed": 250}
            assert json.loads(stdout)["updated"] == counts
            assert json.loads(stdout)["resumed"] == safe
            assert 2000 <= work.texts() <= 2000 + SMALL["max_in_flight"] * SMALL["batch_texts"]
        wait_until_redis_is_empty(redis)
    assert np.array_equal(vectors(output), stub_vectors([d["text"] for d in after]))
    assert [item["id"] for item in items(output)] == [d["id"] for d in after]
    assert files_beside(output) == {
        *("before.jsonl", "after.jsonl"),
        *("out.npy", "out.items.jsonl", "out.npy.embedq.json"),
    }


def test_update_keeps_the_count_of_bad_lines(small: Client, tmp_path: Path) -> None:
    """Bad lines are counted in the manifest of an update as in that of a first run."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, documents(5))
    embed(small, source, output, skip_bad_lines=True)
    with source.open("a") as lines:
        lines.write("{\n")

    summary = embed(small, source, output, update=True, skip_bad_lines=True)

    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    assert (summary.skipped_lines, manifest.skipped) == (1, 1)
