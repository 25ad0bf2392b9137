"""Input and output formats of `embedq embed`, and its memory."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tests.support.cli import command, finish, start
from tests.support.files import documents, embed, items, rows, vectors, write_jsonl
from tests.support.redis import RedisProcess
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.bulk.readers import BadLine, Fields, Reading, read
from embedq.errors import InputError
from embedq.jobs.batches import Document
from embedq.testing import stub_vectors

#: Texts that a format may corrupt.
TEXTS = ["plain", "é 🦀 日本語", 'a "quoted" word', "comma, and; semicolon", "tab\there", ""]


def as_jsonl(texts: list[str]) -> str:
    return "".join(json.dumps({"id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(texts))


def as_csv(texts: list[str]) -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    return "id,text\n" + "".join(f"d{i},{text}\n" for i, text in enumerate(quoted))


def as_txt(texts: list[str]) -> str:
    return "".join(text + "\n" for text in texts)


INPUTS = {"jsonl": as_jsonl, "csv": as_csv, "txt": as_txt}


@pytest.mark.parametrize("output", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("kind", INPUTS)
def test_each_input_format_becomes_each_output_format(
    kind: str, gzipped: bool, output: str, small: Client, tmp_path: Path
) -> None:
    if output == "parquet":
        pytest.importorskip("pyarrow")
    raw = INPUTS[kind](TEXTS).encode()
    source = tmp_path / (f"in.{kind}.gz" if gzipped else f"in.{kind}")
    source.write_bytes(gzip.compress(raw) if gzipped else raw)

    summary = embed(small, source, tmp_path / f"out.{output}")

    found = rows(tmp_path / f"out.{output}")
    assert (summary.total, summary.ok) == (len(TEXTS), len(TEXTS))
    assert np.array_equal([row["vector"] for row in found], stub_vectors(TEXTS))
    names = [f"d{i}" for i in range(len(TEXTS))] if kind != "txt" else range(1, len(TEXTS) + 1)
    assert [str(row["id"]) for row in found] == [str(name) for name in names]
    assert [row["row"] for row in found] == list(range(len(TEXTS)))


@pytest.mark.parametrize("output", ["npy", "jsonl", "parquet"])
def test_failed_text_has_no_vector_in_any_output(
    output: str, small: Client, tmp_path: Path
) -> None:
    """The vector is NaN in npy and null in jsonl and parquet."""
    if output == "parquet":
        pytest.importorskip("pyarrow")
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": None}, {"text": "b"}])

    summary = embed(small, source, tmp_path / f"out.{output}")

    first, bad, last = rows(tmp_path / f"out.{output}")
    assert (summary.ok, summary.failed) == (2, 1)
    assert (bad["status"], bad["code"], bad["vector"]) == ("failed", "not_a_string", None)
    assert np.array_equal([first["vector"], last["vector"]], stub_vectors(["a", "b"]))
    if output == "npy":
        assert np.isnan(vectors(tmp_path / "out.npy")[1]).all()


def test_parquet_has_typed_columns(small: Client, tmp_path: Path) -> None:
    """Vectors are fixed-size lists; ids are strings."""
    parquet = pytest.importorskip("pyarrow.parquet")
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": 7, "text": "a"}, {"id": "x", "text": "b"}])

    embed(small, source, tmp_path / "out.parquet")

    table = parquet.read_table(tmp_path / "out.parquet")
    assert str(table.schema.field("vector").type) == "fixed_size_list<element: float>[384]"
    assert table.column("id").to_pylist() == ["7", "x"]
    assert str(table.schema.field("n_tokens").type) == "int64"
    assert str(table.schema.field("truncated").type) == "bool"


def test_ids_that_are_not_utf8_are_written(small: Client, tmp_path: Path) -> None:
    """Parquet cannot store a lone surrogate, so it is escaped."""
    source = write_jsonl(tmp_path / "in.jsonl", [{"id": "a\ud800", "text": "a"}])

    embed(small, source, tmp_path / "out.jsonl")
    assert rows(tmp_path / "out.jsonl")[0]["id"] == "a\ud800"

    pytest.importorskip("pyarrow")
    embed(small, source, tmp_path / "out.parquet")
    assert rows(tmp_path / "out.parquet")[0]["id"] == "a\\ud800"


def test_output_name_need_not_be_utf8(small: Client, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}])
    output = tmp_path / os.fsdecode(b"o\xff.npy")

    embed(small, source, output)

    assert np.array_equal(vectors(output), stub_vectors(["a"]))


def test_inputs_are_read_in_order_and_globs_sorted(small: Client, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"part-{name}.txt").write_text(f"{name}\n")
    last = write_jsonl(tmp_path / "last.jsonl", [{"id": "x", "text": "last"}])
    output = tmp_path / "out.npy"

    embed(small, [str(tmp_path / "part-c.txt"), str(tmp_path / "part-[ab].txt"), str(last)], output)

    assert np.array_equal(vectors(output), stub_vectors(["c", "a", "b", "last"]))
    assert [item["id"] for item in items(output)] == [1, 1, 1, "x"]


def test_glob_does_not_match_the_sidecar_of_the_output(small: Client, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", documents(20))
    output, inputs = tmp_path / "out.npy", [str(tmp_path / "*.jsonl")]
    embed(small, inputs, output)

    again = embed(small, inputs, output)
    write_jsonl(tmp_path / "b.jsonl", [{"id": "x", "text": "new"}])
    update = embed(small, inputs, output, update=True)

    assert (again.total, again.resumed) == (20, 20)
    assert update.updated == {"new": 1, "changed": 0, "kept": 20, "removed": 0}


def test_standard_input_is_read_and_resumed(
    worker: WorkerProcess, shared_redis: RedisProcess, tmp_path: Path
) -> None:
    """Standard input is jsonl unless --format is given."""
    output = tmp_path / "out.jsonl"

    code, stdout, stderr = finish(
        start(shared_redis, "embed", "-", "-o", output, "--json"), as_jsonl(TEXTS)
    )
    txt = tmp_path / "txt.npy"
    finish(start(shared_redis, "embed", "-", "-o", txt, "--format", "txt"), as_txt(TEXTS))
    again = finish(start(shared_redis, "embed", "-", "-o", output), as_jsonl(TEXTS))

    assert code == 0, stderr
    assert json.loads(stdout)["total"] == len(TEXTS)
    assert np.array_equal([row["vector"] for row in rows(output)], stub_vectors(TEXTS))
    assert np.array_equal(vectors(txt), stub_vectors(TEXTS))
    assert again[0] == 0
    assert "already complete" in again[2]


def read_all(path: Path, **options: object) -> list[Document]:
    return list(read([str(path)], fields=Fields(), **options))  # type: ignore[arg-type] # as given


@pytest.mark.parametrize("kind", INPUTS)
def test_byte_order_mark_and_crlf_are_ignored(kind: str, tmp_path: Path) -> None:
    plain, windows = tmp_path / f"plain.{kind}", tmp_path / f"windows.{kind}"
    plain.write_bytes(INPUTS[kind](TEXTS).encode())
    windows.write_bytes(b"\xef\xbb\xbf" + INPUTS[kind](TEXTS).replace("\n", "\r\n").encode())

    assert read_all(windows) == read_all(plain)
    assert [document.text for document in read_all(plain)] == TEXTS


def test_blank_lines_are_documents_only_in_txt(tmp_path: Path) -> None:
    for kind, content in (
        ("jsonl", '\n{"text": "a"}\n  \n\n{"text": "b"}\n\n'),
        ("csv", "text\n\na\n\n\nb\n\n"),
        ("txt", "a\n\nb\n"),
    ):
        (tmp_path / f"in.{kind}").write_text(content)

    assert [(d.id, d.text) for d in read_all(tmp_path / "in.jsonl")] == [(2, "a"), (5, "b")]
    assert [(d.id, d.text) for d in read_all(tmp_path / "in.csv")] == [(3, "a"), (6, "b")]
    assert [d.text for d in read_all(tmp_path / "in.txt")] == ["a", "", "b"]


def test_last_line_needs_no_newline(tmp_path: Path) -> None:
    for kind, write in INPUTS.items():
        (tmp_path / f"in.{kind}").write_text(write(["a", "b"]).removesuffix("\n"))

        assert [d.text for d in read_all(tmp_path / f"in.{kind}")] == ["a", "b"], kind


def test_quoted_csv_fields_may_contain_commas_quotes_and_newlines(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('text,id\n"a, ""b""\nc",1\nplain,2\n"",3\n')

    found = read_all(tmp_path / "in.csv")

    assert [(d.id, d.text) for d in found] == [("1", 'a, "b"\nc'), ("2", "plain"), ("3", "")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_open_quote_loses_only_its_own_line(newline: str, tmp_path: Path) -> None:
    """The lines after an unclosed quote are parsed again, with the right line numbers."""
    lines = ["text", "a", '"open', "b", '"c\nc"', '"x"y', "d", '"end']
    (tmp_path / "in.csv").write_bytes(newline.join(lines).encode())
    reading = Reading()

    found = read_all(tmp_path / "in.csv", skip_bad_lines=True, reading=reading)

    assert [(d.id, d.text) for d in found] == [(2, "a"), (4, "b"), (5, "c\nc"), (8, "d")]
    assert reading.skipped == 3
    with pytest.raises(BadLine, match="line 3: not CSV"):
        read_all(tmp_path / "in.csv")


def test_broken_csv_header_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('"id,text\n1,a\n')

    with pytest.raises(InputError, match="line 1: not CSV"):
        read_all(tmp_path / "in.csv")


def test_field_options_name_id_and_text(small: Client, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in.jsonl", [{"key": "k", "body": "text", "id": "no", "text": "no"}])
    (tmp_path / "in.csv").write_text("text,body,key\nno,text,k\n")
    fields = Fields(id="key", text="body")

    for kind in ("jsonl", "csv"):
        output = tmp_path / f"{kind}.npy"
        embed(small, tmp_path / f"in.{kind}", output, fields=fields)

        assert np.array_equal(vectors(output), stub_vectors(["text"]))
        assert [item["id"] for item in items(output)] == ["k"]


def test_truncated_gzip_is_an_error_and_can_be_resumed(small: Client, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl.gz"
    whole = gzip.compress("".join(json.dumps(d) + "\n" for d in documents(2_000)).encode())
    source.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InputError, match=r"in\.jsonl\.gz: reading failed"):
        embed(small, source, tmp_path / "out.npy")

    source.write_bytes(whole)
    assert embed(small, source, tmp_path / "out.npy").total == 2_000


@pytest.mark.parametrize(
    ("kind", "bad", "n_lines"),
    [
        ("jsonl", '{"id": "broken', 100_000),
        ("csv", '1,"open', 50_000),
        ("csv", "1,2,3", 50_000),
    ],
)
def test_bad_line_is_reported_or_skipped(kind: str, bad: str, n_lines: int, tmp_path: Path) -> None:
    source, at = tmp_path / f"in.{kind}", n_lines // 2
    line = '{{"id": {0}, "text": "t{0}"}}' if kind == "jsonl" else "{0},t{0}"
    with source.open("w") as out:
        out.write("id,text\n" if kind == "csv" else "")
        out.writelines((bad if i == at else line.format(i)) + "\n" for i in range(n_lines))
    reading = Reading()

    found = read([str(source)], fields=Fields(), skip_bad_lines=True, reading=reading)
    names = np.fromiter((int(document.id) for document in found), np.int64)

    assert reading.skipped == 1
    assert np.array_equal(names, np.delete(np.arange(n_lines), at))
    with pytest.raises(BadLine, match=f"line {at + 1 + (kind == 'csv'):,}: "):
        list(read([str(source)], fields=Fields()))


def test_command_fails_on_or_skips_a_bad_line(
    worker: WorkerProcess, shared_redis: RedisProcess, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text('{"text": "a"}\nbroken\n{"text": "b"}\n')

    failed = command(shared_redis, "embed", source, "-o", output)
    skipped = command(shared_redis, "embed", source, "-o", output, "--on-bad-line", "skip")

    assert failed[0] == 3
    assert "in.jsonl, line 2: not JSON" in failed[2]
    assert skipped[0] == 0
    assert "1 bad lines skipped" in skipped[1]
    assert np.array_equal(vectors(output), stub_vectors(["a", "b"]))


def peak_rss_mb(redis: RedisProcess, folder: Path, n: int) -> float:
    """Embed n short texts with the command, and return its peak RSS in MB."""
    source = folder / f"{n}.txt"
    source.write_text("".join(f"a text of some words, number {i}\n" for i in range(n)))
    large = {"EMBEDQ_BATCH_TEXTS": "512", "EMBEDQ_MAX_IN_FLIGHT": "8"}
    process = start(redis, "embed", source, "-o", folder / f"{n}.npy", "-q", **large)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    finish(process)
    assert process.returncode == 0
    return usage.ru_maxrss / 1e3


def test_memory_does_not_grow_with_the_input(
    worker: WorkerProcess, shared_redis: RedisProcess, tmp_path: Path
) -> None:
    few = peak_rss_mb(shared_redis, tmp_path, 6_000)  # more than a window of 4,096
    many = peak_rss_mb(shared_redis, tmp_path, 30_000)

    assert many < 1.1 * few, f"{few:.0f} MB for 6,000 texts, {many:.0f} MB for 30,000"
