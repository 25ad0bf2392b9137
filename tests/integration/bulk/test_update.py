"""`--update` copies unchanged rows, embeds the others and counts both."""

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

#: File descriptor of an input pipe; the first that bash uses for `<(command)`.
PIPE = 63


def changed(before: Documents) -> tuple[Documents, dict[str, int]]:
    """Return other documents in another order, and how many are new, changed, removed and kept."""
    after = [document for at, document in enumerate(before) if at % 10]
    for document in after[::7]:
        document["text"] += " changed"
    n_changed = len(after[::7])
    after += [{"id": f"new{i}", "text": f"new {i}"} for i in range(13)]
    random.Random(1).shuffle(after)
    counts = {"new": 13, "changed": n_changed, "removed": len(before[::10])}
    return after, {**counts, "kept": len(after) - 13 - n_changed}


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_updated_output_equals_a_new_one(
    ending: str, small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    """Only new and changed texts are computed."""
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


def test_update_without_changes_computes_nothing(
    small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
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


def test_unchanged_vectors_are_copied(small: Client, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", documents(50))
    output = tmp_path / "out.npy"
    embed(small, source, output)
    marked = vectors(output)
    marked[7] = 7.0
    np.save(output, marked)
    write_jsonl(source, [{"id": "first", "text": "first"}, *documents(50)])

    embed(small, source, output, update=True)

    assert np.array_equal(vectors(output)[1:], marked)


def test_lines_without_ids_are_matched_by_text(
    small: Client, worker: WorkerProcess, tmp_path: Path
) -> None:
    """The id of a line is its new line number."""
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
def test_equal_lines_are_matched_row_by_row(name: str, small: Client, tmp_path: Path) -> None:
    """Surplus lines share a row."""
    before, after, counts = DUPLICATES[name]
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("".join(f"{line}\n" for line in before))
    embed(small, source, output)
    source.write_text("".join(f"{line}\n" for line in after))

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 0, "changed": 0, "kept": 0, "removed": 0, **counts}
    assert np.array_equal(vectors(output), stub_vectors(after))


def test_duplicate_ids_are_matched_document_by_document(small: Client, tmp_path: Path) -> None:
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
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, [{"id": 1, "text": "same"}])
    embed(small, source, output)
    write_jsonl(source, [{"id": 2, "text": "same"}])

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 1, "changed": 0, "kept": 0, "removed": 1}
    assert [item["id"] for item in items(output)] == [2]


def test_update_retries_failed_texts(small: Client, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, [{"id": "a", "text": "x\0y"}, {"id": "b", "text": "b\0"}])
    embed(small, source, output)
    write_jsonl(source, [{"id": "a", "text": "fixed"}, {"id": "b", "text": "b\0"}])

    summary = embed(small, source, output, update=True)

    assert (summary.ok, summary.failed) == (1, 1)
    assert summary.updated == {"new": 0, "changed": 2, "kept": 0, "removed": 0}
    assert np.array_equal(vectors(output)[:1], stub_vectors(["fixed"]))
    assert np.isnan(vectors(output)[1]).all()


@pytest.mark.parametrize("ending", ["npy", "jsonl", "parquet"])
def test_output_can_be_updated_to_empty_and_back(
    ending: str, small: Client, tmp_path: Path
) -> None:
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


def test_ids_that_are_not_utf8_are_matched(small: Client, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_jsonl(source, [{"id": "\ud800", "text": "a"}, {"id": "é🦀", "text": "b"}])
    embed(small, source, output)

    summary = embed(small, source, output, update=True)

    assert summary.updated == {"new": 0, "changed": 0, "kept": 2, "removed": 0}
    assert [row["id"] for row in rows(output)] == ["\ud800", "é🦀"]


def test_update_accepts_other_files_and_fields(small: Client, tmp_path: Path) -> None:
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


def test_update_without_a_complete_output_is_refused(small: Client, tmp_path: Path) -> None:
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
def test_update_of_a_modified_output_is_refused(ending: str, small: Client, tmp_path: Path) -> None:
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
def test_update_of_a_damaged_sidecar_is_refused(name: str, small: Client, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", documents(5))
    output = tmp_path / "out.npy"
    embed(small, source, output)
    path = sidecar_path(output)
    path.write_text(DAMAGE[name](path.read_text()))

    with pytest.raises(InputError, match=r"items\.jsonl: lacks the format.*--restart"):
        embed(small, source, output, update=True)


@pytest.mark.parametrize("spare_kib", [60, 600, 1000])
def test_update_on_a_full_disk_can_be_resumed(spare_kib: int, command: Command) -> None:
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
        pytest.skip("mounting a file system needs root")
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
def test_update_killed_before_any_file_operation_can_be_resumed(
    ending: str, small: Client, tmp_path: Path
) -> None:
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


def test_killed_update_that_only_removes_can_be_resumed(small: Client, tmp_path: Path) -> None:
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


def test_killed_update_of_a_glob_can_be_resumed(small: Client, tmp_path: Path) -> None:
    """The glob does not match the files of the killed update."""
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
    """Yield the name of a pipe that contains a text, like that of `<(command)`; always the same."""
    source, sink = os.pipe()
    os.write(sink, text.encode())
    os.close(sink)
    os.dup2(source, PIPE)
    os.close(source)
    yield [f"/dev/fd/{PIPE}"]
    os.close(PIPE)


def test_killed_update_from_a_pipe_succeeds_or_asks_to_run_again(
    small: Client, tmp_path: Path
) -> None:
    """A pipe can be read only once, so the first try after a kill may be refused."""
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


def test_killed_update_resumes(redis: RedisProcess, short_dir: Path, tmp_path: Path) -> None:
    """The kill repeats at most one window of batches and leaves no files."""
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
            confirmed = kill_at(start(redis, *update), delta, 500)
            code, stdout, stderr = command(redis, *update)

            assert code == 0, stderr
            counts = {"new": 2000, "changed": 0, "kept": 250, "removed": 250}
            assert json.loads(stdout)["updated"] == counts
            assert json.loads(stdout)["resumed"] == confirmed
            assert 2000 <= work.texts() <= 2000 + SMALL["max_in_flight"] * SMALL["batch_texts"]
        wait_until_redis_is_empty(redis)
    assert np.array_equal(vectors(output), stub_vectors([d["text"] for d in after]))
    assert [item["id"] for item in items(output)] == [d["id"] for d in after]
    assert files_beside(output) == {
        *("before.jsonl", "after.jsonl"),
        *("out.npy", "out.items.jsonl", "out.npy.embedq.json"),
    }


def test_update_counts_bad_lines(small: Client, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    write_jsonl(source, documents(5))
    embed(small, source, output, skip_bad_lines=True)
    with source.open("a") as lines:
        lines.write("{\n")

    summary = embed(small, source, output, update=True, skip_bad_lines=True)

    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    assert (summary.skipped_lines, manifest.skipped) == (1, 1)
