"""Readers of jsonl, csv and txt files, plain or gzipped, that yield one document at a time.

A line that cannot be parsed is a bad line: the caller chooses whether to stop or to skip it. A
document whose text cannot be embedded is not a bad line: it is passed on and fails alone.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

from embedq.errors import InputError, did_you_mean
from embedq.jobs.batches import Document
from embedq.protocol.contract import MAX_TEXT_BYTES

#: Name that stands for standard input.
STDIN: Final = "-"

#: Maximum bytes of one line. JSON escapes make a text up to six times as long.
MAX_LINE_BYTES: Final = 8 * MAX_TEXT_BYTES

#: Input formats, which are also the file name endings.
FORMATS: Final = ("jsonl", "csv", "txt")


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the fields of a jsonl file, or columns of a csv file.

    Attributes:
        id: field of the id; a document without it gets its line number as id.
        text: field of the text.
    """

    id: str = "id"
    text: str = "text"


class BadLine(InputError):
    """A line that cannot be parsed as a document."""

    code = "bad_line"

    def __init__(self, source: str, line: int, reason: str) -> None:
        super().__init__(
            f"{source}, line {line:,}: {reason}. Fix the line, or skip such lines with "
            "--on-bad-line skip."
        )


_Items = Generator[Document | BadLine, None, None]


@dataclass(slots=True)
class Reading:
    """Progress of reading the inputs.

    Attributes:
        total_bytes: size of all inputs on disk; 0 if unknown.
        bytes_done: size of the inputs that were read completely.
        position: returns the offset in the current input, in bytes.
        skipped: number of skipped bad lines.
    """

    total_bytes: int = 0
    bytes_done: int = 0
    position: Callable[[], int] = int
    skipped: int = 0

    def fraction(self) -> float | None:
        """Return the share of all inputs read so far, or None if their size is unknown."""
        if not self.total_bytes:
            return None
        return min(1.0, (self.bytes_done + self.position()) / self.total_bytes)


def expand(inputs: Sequence[str], exclude: Sequence[Path] = ()) -> list[str]:
    """Expand globs into sorted file names, in the order of the inputs.

    Args:
        inputs: file names, globs or ``-`` for standard input.
        exclude: files that globs leave out, such as those of the output.

    Raises:
        InputError: a file does not exist, is a folder, or cannot be read.
    """
    found: list[str] = []
    for name in inputs:
        if name == STDIN:
            found.append(name)
            continue
        matches: list[str] = []
        if glob.has_magic(name) and not Path(name).exists():
            excluded = {path.resolve() for path in exclude}
            matches = sorted(m for m in glob.glob(name) if Path(m).resolve() not in excluded)  # noqa: PTH207 # Path.glob takes no absolute pattern
        for path in map(Path, matches or [name]):
            _require_readable(path)
            found.append(str(path))
    if found.count(STDIN) > 1:
        raise InputError("Standard input (-) is named twice, but can be read only once.")
    return found


def format_of(name: str, given: str | None = None) -> str:
    """Return the format of an input: as given, else by its ending; standard input is jsonl.

    Raises:
        InputError: the ending is unknown.
    """
    if given is not None:
        return given
    if name == STDIN:
        return "jsonl"
    suffix = Path(name.removesuffix(".gz")).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise InputError(
            f"{name}: unknown ending {suffix or '(none)'}; expected one of {', '.join(FORMATS)}, "
            f"also with .gz. Name the format with --format.{did_you_mean(suffix, FORMATS)}"
        )
    return suffix


def read(
    inputs: Sequence[str],
    *,
    fields: Fields,
    format: str | None = None,
    skip_bad_lines: bool = False,
    reading: Reading | None = None,
) -> Iterator[Document]:
    """Yield the documents of all inputs, in order.

    Args:
        inputs: file names, as returned by expand.
        fields: names of the id and text fields in jsonl and csv.
        format: format of every input; by default chosen by the ending.
        skip_bad_lines: skip and count bad lines instead of raising.
        reading: progress to update.

    Raises:
        BadLine: a line cannot be parsed, and skip_bad_lines is false.
        InputError: a file cannot be read.
    """
    reading = reading if reading is not None else Reading()
    if STDIN not in inputs:
        reading.total_bytes = sum(Path(name).stat().st_size for name in inputs)
    parsers = {"jsonl": _jsonl, "csv": _csv, "txt": _txt}
    for name in inputs:
        parse = parsers[format_of(name, format)]
        source = "standard input" if name == STDIN else name
        with _open(name) as raw:
            reading.position = partial(_offset, raw)
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if name.endswith(".gz") else raw
            try:
                if name.endswith(".gz") and not raw.peek(1):
                    raise EOFError("it is empty; a .gz file has a header")
                with closing(parse(stream, source, fields)) as items:
                    for item in items:
                        if isinstance(item, Document):
                            yield item
                        elif skip_bad_lines:
                            reading.skipped += 1
                        else:
                            raise item
            except (OSError, EOFError, zlib.error) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError(f"{source}: reading failed ({reason}).") from error
            if name != STDIN:  # fstat: the file may have been renamed meanwhile
                reading.position = int
                reading.bytes_done += os.fstat(raw.fileno()).st_size


def _jsonl(stream: IO[bytes], source: str, fields: Fields) -> _Items:
    for number, line in _lines(stream):
        if line is None:
            yield BadLine(source, number, f"longer than {MAX_LINE_BYTES:,} bytes")
            continue
        if not line.strip():
            continue
        try:
            # Decoded here, because json would guess the encoding of bytes.
            record = json.loads(line.decode("utf-8", "surrogatepass"))
        except (ValueError, RecursionError) as error:
            yield BadLine(source, number, f"not JSON ({_reason(error)})")
            continue
        if not isinstance(record, dict):
            yield BadLine(source, number, f"a JSON {type(record).__name__}, not an object")
        elif fields.text not in record:
            hint = did_you_mean(fields.text, record)
            yield BadLine(source, number, f"no field {fields.text!r} (--text-field).{hint}")
        else:
            name = record.get(fields.id)
            if name is None:
                yield Document(number, record[fields.text], named=False)
            elif isinstance(name, str | int) and not isinstance(name, bool):
                yield Document(name, record[fields.text])
            else:
                kind = type(name).__name__
                reason = f"the id ({fields.id!r}, --id-field) is a JSON {kind}, not str or int"
                yield BadLine(source, number, reason)


def _csv(stream: IO[bytes], source: str, fields: Fields) -> _Items:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Invalid UTF-8 becomes lone surrogates, so only the texts that contain it fail.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        yield from _csv_documents(_csv_rows(_text_lines(text)), source, fields)
    finally:
        text.detach()  # the caller closes the stream


def _text_lines(text: IO[str]) -> Iterator[str]:
    # A line above the limit is cut one character behind it, so that _csv_rows reports it.
    while line := text.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(("\r", "\n")):
            line = text.readline(MAX_LINE_BYTES + 1)


def _csv_rows(lines: Iterator[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    # Yields the number of each row's first line, from 1, and the row or its parse error. After an
    # error, parsing continues at the second line of the broken row, because an unclosed quote makes
    # all following lines part of that row.
    pushed_back: deque[str] = deque()
    row_lines: list[str] = []

    def supply() -> Iterator[str]:
        while (line := pushed_back.popleft() if pushed_back else next(lines, None)) is not None:
            row_lines.append(line)
            if len(line) > MAX_LINE_BYTES:
                raise csv.Error(f"line longer than {MAX_LINE_BYTES:,} characters")
            yield line

    rows = csv.reader(supply(), strict=True)
    number = 1
    while True:
        row_lines.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, error
            pushed_back.extendleft(reversed(row_lines[1:]))
            rows = csv.reader(supply(), strict=True)
            number += 1
            continue
        yield number, row
        number += len(row_lines)


def _csv_documents(
    rows: Iterator[tuple[int, list[str] | csv.Error]], source: str, fields: Fields
) -> _Items:
    _, header = next(rows, (0, []))
    if isinstance(header, csv.Error):
        raise InputError(f"{source}, line 1: not CSV ({header}).")
    if not header:
        return
    if fields.text not in header:
        hint = did_you_mean(fields.text, header)
        raise InputError(f"{source}: no column {fields.text!r} (--text-field).{hint}")
    text_at = header.index(fields.text)
    id_at = header.index(fields.id) if fields.id in header else None
    for number, row in rows:
        if isinstance(row, csv.Error):
            yield BadLine(source, number, f"not CSV ({row})")
        elif len(row) == len(header):
            name = number if id_at is None else row[id_at]
            yield Document(name, row[text_at], named=id_at is not None)
        elif row:
            columns = f"{len(row)} columns where the header has {len(header)}"
            yield BadLine(source, number, columns)


def _txt(stream: IO[bytes], source: str, fields: Fields) -> _Items:
    for number, line in _lines(stream):
        if line is None:
            text = "x" * (MAX_TEXT_BYTES + 1)  # fails as too large
        else:
            # Invalid UTF-8 becomes lone surrogates, so only this text fails.
            text = line.rstrip(b"\r\n").decode(errors="surrogateescape")
        yield Document(number, text, named=False)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    # Yields the line number from 1 and the line, or None for a line above the limit.
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
            yield number, line
            continue
        while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
            pass
        yield number, None


def _open(name: str) -> io.BufferedReader:
    if name == STDIN:
        if sys.stdin is None:
            raise InputError("Standard input (-) is closed. Name a file, or pipe one into it.")
        return cast(io.BufferedReader, sys.stdin.buffer)
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise InputError(
            f"{name}: {error.strerror}. Restore the file and run the same command again to "
            "continue."
        ) from error


def _offset(raw: BinaryIO) -> int:
    return 0 if raw.closed or not raw.seekable() else raw.tell()


def _require_readable(path: Path) -> None:
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder. Name a file, or a glob such as {path}/*.jsonl")
        if not path.is_fifo():  # opening and closing a pipe would end its writer
            with path.open("rb"):
                pass
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None


def _reason(error: Exception) -> str:
    # Never quotes the line: texts do not appear in messages.
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number with too many digits"
