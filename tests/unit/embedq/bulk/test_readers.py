"""Tests of reading documents from JSONL, CSV and text files."""

from __future__ import annotations

import gzip
import io
import json
import os
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from embedq.bulk import readers
from embedq.bulk.readers import MAX_LINE_BYTES, Fields, Reading, expand, format_of, read
from embedq.errors import InputError
from embedq.jobs.batches import Document

FIELDS = Fields()


def documents(path: Path, *, skip: bool = False) -> list[tuple[str | int, object]]:
    """Return id and text of every document of a file."""
    return [
        (doc.id, doc.text) for doc in read([os.fspath(path)], fields=FIELDS, skip_bad_lines=skip)
    ]


def write_file(folder: Path, name: str, content: str | bytes) -> Path:
    """Write a file and return its path."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_document_without_id_gets_its_line_number(tmp_path: Path) -> None:
    path = write_file(
        tmp_path,
        "a.jsonl",
        '{"id": "x", "text": "one"}\n\n{"id": 7, "text": "two"}\n{"text": "three", "id": null}\n',
    )

    assert documents(path) == [("x", "one"), (7, "two"), (4, "three")]


def test_text_that_is_not_a_string_is_read_unchanged(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.jsonl", '{"text": 7}\n{"text": null}\n{"text": "\\ud800"}\n')

    assert [text for _, text in documents(path)] == [7, None, "\ud800"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "not JSON"),
        ('{"text": "a"', "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ('"text"', "a JSON str, not an object"),
        ('{"txt": "a"}', r"no field 'text' \(--text-field\). Did you mean txt\?"),
        ('{"id": 7.0, "text": "a"}', r"the id .* is a JSON float, not str or int"),
        ('{"id": NaN, "text": "a"}', r"the id .* is a JSON float, not str or int"),
        ('{"id": true, "text": "a"}', r"the id .* is a JSON bool, not str or int"),
        ('{"id": [1], "text": "a"}', r"the id .* is a JSON list, not str or int"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "not JSON .*digits"),
        ("[" * 100_000, "not JSON .nested too deeply"),
    ],
)
def test_invalid_line_is_refused_with_file_line_and_reason(
    line: str, reason: str, tmp_path: Path
) -> None:
    path = write_file(tmp_path, "a.jsonl", '{"text": "good"}\n' + line + "\n")

    with pytest.raises(InputError, match=rf"a\.jsonl, line 2: {reason}.*--on-bad-line skip"):
        documents(path)


def test_jsonl_line_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.jsonl", b'{"text": "\xff"}\n')

    with pytest.raises(InputError, match=r"line 1: not JSON \(not UTF-8"):
        documents(path)


def test_skipped_lines_are_counted_and_numbered(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.jsonl", '{"text": "a"}\nbad\n[]\n{"text": "b"}\n')
    reading = Reading()

    found = list(read([os.fspath(path)], fields=FIELDS, skip_bad_lines=True, reading=reading))

    assert [(doc.id, doc.text) for doc in found] == [(1, "a"), (4, "b")]
    assert reading.skipped == 2


def test_txt_gives_one_document_per_line(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\ntw\xc2\x85o\x0b\nlast")

    assert documents(path) == [(1, "one"), (2, ""), (3, "tw\x85o\x0b"), (4, "last")]


def test_txt_line_that_is_not_utf8_becomes_a_text_with_surrogates(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.txt", b"good\n\xff\xfe\n")

    [_, (_, broken)] = documents(path)

    assert isinstance(broken, str)
    with pytest.raises(UnicodeEncodeError):
        broken.encode()


def test_jsonl_line_of_20_mb_is_skipped(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.jsonl", b"x" * 20_000_000 + b'\n{"text": "next"}\n')

    assert documents(path, skip=True) == [(2, "next")]


class LongCsv(io.RawIOBase):
    """CSV stream whose second row has a line of 64 MiB; records the peak of traced memory."""

    def __init__(self, *, quote: str) -> None:
        rest = b"x" * (64 << 20)
        body = b"id,text,more\n1,a,b\n2," + quote.encode() + rest + b",y\n3,c,d\n"
        self._body = io.BytesIO(body)
        self.peak_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        allocated, _ = tracemalloc.get_traced_memory()
        self.peak_bytes = max(self.peak_bytes, allocated)
        return self._body.readinto(buffer)


@pytest.mark.parametrize("quote", ["", '"'])
def test_csv_line_of_64_mib_is_skipped_in_bounded_memory(
    quote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, reading = LongCsv(quote=quote), Reading()
    monkeypatch.setattr(readers, "_open", lambda _: io.BufferedReader(source))
    tracemalloc.start()
    try:
        found = read(["-"], fields=FIELDS, format="csv", skip_bad_lines=True, reading=reading)
        names = [document.id for document in found]
    finally:
        tracemalloc.stop()

    assert (names, reading.skipped) == (["1", "3"], 1)
    assert source.peak_bytes < 5 * MAX_LINE_BYTES


def test_csv_columns_are_found_by_name(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.csv", 'id,text,more\n1,"a, b\nc",x\n2,short\n3,last,y\n')

    assert documents(path, skip=True) == [("1", "a, b\nc"), ("3", "last")]
    with pytest.raises(InputError, match="line 4: 2 columns where the header has 3"):
        documents(path)


def test_csv_without_the_text_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_file(tmp_path, "a.csv", "id,texts\n1,a\n")

    with pytest.raises(InputError, match=r"no column 'text' \(--text-field\). Did you mean texts"):
        documents(path)


def test_gzip_is_decompressed_and_damage_is_reported(tmp_path: Path) -> None:
    packed = gzip.compress(json.dumps({"text": "a" * 5000}).encode())
    good = write_file(tmp_path, "a.jsonl.gz", packed)
    cut = write_file(tmp_path, "b.jsonl.gz", packed[:-20])
    empty = write_file(tmp_path, "c.jsonl.gz", b"")

    assert documents(good) == [(1, "a" * 5000)]
    with pytest.raises(InputError, match=r"b\.jsonl\.gz: reading failed"):
        documents(cut)
    with pytest.raises(InputError, match=r"c\.jsonl\.gz: reading failed \(it is empty"):
        documents(empty)


def test_inputs_are_expanded_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "z.txt"):
        write_file(tmp_path, name, "x")

    found = expand([os.fspath(tmp_path / "z.txt"), os.fspath(tmp_path / "[ab].txt")])

    assert [Path(name).name for name in found] == ["z.txt", "a.txt", "b.txt"]
    with pytest.raises(InputError, match="No such file"):
        expand([os.fspath(tmp_path / "q*.txt")])


def test_named_pipe_is_opened_once(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=('{"text": "a text"}\n',))
    writer.start()
    inputs = expand([os.fspath(path)])
    found = [document.text for document in read(inputs, fields=FIELDS)]
    writer.join()

    assert found == ["a text"]


def test_file_deleted_while_open_is_read_to_its_end(tmp_path: Path) -> None:
    first = write_file(tmp_path, "a.txt", "one\ntwo\n")
    second = write_file(tmp_path, "b.txt", "three\n")
    reader = read([os.fspath(first), os.fspath(second)], fields=FIELDS)

    texts = [next(reader).text]
    first.unlink()
    second.unlink()
    texts.append(next(reader).text)

    assert texts == ["one", "two"]
    with pytest.raises(InputError, match=r"b\.txt: No such file.*the same command again"):
        next(reader)


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)

    with pytest.raises(InputError, match=r"Standard input .* is closed"):
        list(read(["-"], fields=FIELDS))


def test_folder_missing_file_and_second_stdin_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is a folder\. Name a file, or a glob"):
        expand([os.fspath(tmp_path)])
    with pytest.raises(InputError, match=r"missing\.txt: No such file"):
        expand([os.fspath(tmp_path / "missing.txt")])
    with pytest.raises(InputError, match="named twice"):
        expand(["-", "-"])


@pytest.mark.parametrize(
    ("name", "format_"),
    [("a.jsonl", "jsonl"), ("a.TXT", "txt"), ("a.csv.gz", "csv"), ("-", "jsonl")],
)
def test_format_follows_the_suffix_unless_given(name: str, format_: str) -> None:
    assert format_of(name) == format_
    assert format_of(name, "txt") == "txt"


def test_unknown_suffix_names_the_nearest_format(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown ending josnl.*--format.*Did you mean jsonl"):
        format_of("a.josnl")


def test_representation_of_a_document_shows_no_text() -> None:
    assert "geheimnis" not in repr(Document(1, "Kundengeheimnis"))
