"""Read jsonl, csv and txt, also compressed, as documents.

CSV rows with their line numbers; a quote that is never closed costs its own line only.

Documents out of files: jsonl, csv and txt, plain or gzipped, one at a time whatever the size.

A line that cannot be read as a document is a bad line, and the caller decides whether to stop or to
skip it. A document whose text cannot be embedded is no bad line: it goes on and fails alone.
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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

from embedq.errors import InputError, did_you_mean
from embedq.jobs.batches import Document
from embedq.protocol.contract import MAX_TEXT_BYTES


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield each row, or what is wrong with it, with the number of its first line from 1.

    Behind a broken row reading goes on at its second line: with an open quote the row has swallowed
    many good ones, up to csv.field_size_limit characters. A longer line is broken in any case.
    """
    source = iter(lines)
    again: deque[str] = deque()
    taken: list[str] = []

    def supply() -> Iterator[str]:
        while True:
            line = again.popleft() if again else next(source, None)
            if line is None:
                return
            taken.append(line)
            if len(line) > csv.field_size_limit():
                raise csv.Error(f"line longer than {csv.field_size_limit():,} characters")
            yield line

    rows = csv.reader(supply(), strict=True)
    number = 1
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, error
            again.extendleft(reversed(taken[1:]))
            rows = csv.reader(supply(), strict=True)
            number += 1
            continue
        yield number, row
        number += len(taken)


#: Reads standard input.
STDIN: Final = "-"


#: Most bytes of one line; JSON escapes may make a text of the largest size six times as long.
MAX_LINE_BYTES: Final = 8 * MAX_TEXT_BYTES


#: Input formats by file name ending.
FORMATS: Final = ("jsonl", "csv", "txt")


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a jsonl or csv file keeps what we need.

    Attributes:
        id: field of the id; a line without it is named by its number.
        text: field of the text.
    """

    id: str = "id"
    text: str = "text"


class BadLine(InputError):
    """A line that is no document."""

    code = "bad_line"

    def __init__(self, source: str, line: int, reason: str) -> None:
        super().__init__(
            f"{source}, line {line:,}: {reason}. Mend the line, or skip such lines with "
            "--on-bad-line skip."
        )


_Items = Generator[Document | BadLine, None, None]


@dataclass(slots=True)
class Reading:
    """Progress of reading, for display.

    Attributes:
        total_bytes: size of all inputs on disk, 0 if unknown.
        bytes_done: of finished inputs.
        position: tells the offset in the current one.
        skipped: bad lines left out.
    """

    total_bytes: int = 0
    bytes_done: int = 0
    position: Callable[[], int] = int
    skipped: int = 0

    def fraction(self) -> float | None:
        """Return the share of the input read so far, or None if its size is unknown."""
        if not self.total_bytes:
            return None
        return min(1.0, (self.bytes_done + self.position()) / self.total_bytes)


def expand(inputs: Sequence[str], own: Sequence[Path] = ()) -> list[str]:
    """Turn arguments into files: names, globs and ``-``, in the order given, globs sorted.

    Args:
        inputs: as given.
        own: files of the output, which no glob means.

    Raises:
        InputError: a name matches nothing, is a folder, or cannot be read.
    """
    found: list[str] = []
    for name in inputs:
        if name == STDIN:
            found.append(name)
            continue
        matches: list[str] = []
        if glob.has_magic(name) and not Path(name).exists():
            ours = {path.resolve() for path in own}
            matches = sorted(m for m in glob.glob(name) if Path(m).resolve() not in ours)  # noqa: PTH207 # Path.glob takes no absolute pattern
        for path in map(Path, matches or [name]):
            _require_readable(path)
            found.append(str(path))
    if found.count(STDIN) > 1:
        raise InputError("Standard input (-) is named twice; it can be read once.")
    return found


def format_of(name: str, given: str | None = None) -> str:
    """Return the format of an input: as given, or by its ending; standard input is jsonl.

    Raises:
        InputError: no such format.
    """
    known = ", ".join(FORMATS)
    if given is not None:
        if given not in FORMATS:
            hint = did_you_mean(given, list(FORMATS))
            raise InputError(f"Format {given}: expected one of {known}.{hint}")
        return given
    if name == STDIN:
        return "jsonl"
    suffix = Path(name.removesuffix(".gz")).suffix.removeprefix(".").lower()
    if suffix not in FORMATS:
        raise InputError(
            f"{name}: unknown ending {suffix or '(none)'}; expected one of {known}, or .gz of one. "
            f"Name the format with --format.{did_you_mean(suffix, list(FORMATS))}"
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
        inputs: as from expand.
        fields: where jsonl and csv keep id and text.
        format: of every input; default: by its ending.
        skip_bad_lines: count and leave out bad lines instead of raising.
        reading: updated as reading goes on.

    Raises:
        BadLine: a line is no document.
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
            reading.position = _teller(raw)
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if name.endswith(".gz") else raw
            try:
                if name.endswith(".gz") and not raw.peek(1):
                    raise EOFError("it is empty, which no .gz is")
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
                raise InputError(f"{source}: cannot be read further ({reason}).") from error
            if name != STDIN:  # of the file that was read, wherever it is by now
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
            record = json.loads(line.decode("utf-8", "surrogatepass"))  # bytes would be guessed at
        except (ValueError, RecursionError) as error:
            yield BadLine(source, number, f"not JSON ({_reason(error)})")
            continue
        if not isinstance(record, dict):
            yield BadLine(source, number, f"a JSON {type(record).__name__}, not an object")
        elif fields.text not in record:
            hint = did_you_mean(fields.text, list(record))
            yield BadLine(source, number, f"no field {fields.text!r} (--text-field).{hint}")
        else:
            name = record.get(fields.id)
            if name is None:
                yield Document(number, record[fields.text], named=False)
            elif isinstance(name, str | int) and not isinstance(name, bool):
                yield Document(name, record[fields.text])
            else:
                kind = type(name).__name__
                reason = f"an id ({fields.id!r}, --id-field) that is a JSON {kind}, not str or int"
                yield BadLine(source, number, reason)


def _csv(stream: IO[bytes], source: str, fields: Fields) -> _Items:
    csv.field_size_limit(MAX_LINE_BYTES)
    # Bytes that are not UTF-8 become lone surrogates, so their text fails alone.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        rows = csv_rows(_text_lines(text))
        _, header = next(rows, (0, []))
        if isinstance(header, csv.Error):
            raise InputError(f"{source}, line 1: not CSV ({header}).")
        if header:
            yield from _csv_documents(rows, header, source, fields)
    finally:
        text.detach()  # the stream belongs to the caller


def _text_lines(text: IO[str]) -> Iterator[str]:
    """Yield lines; of one beyond the limit as much as tells that it is."""
    while line := text.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(("\r", "\n")):
            line = text.readline(MAX_LINE_BYTES + 1)


def _csv_documents(
    rows: Iterator[tuple[int, list[str] | csv.Error]],
    header: list[str],
    source: str,
    fields: Fields,
) -> _Items:
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
            text = "x" * (MAX_TEXT_BYTES + 1)  # refused as too large
        else:
            # Bytes that are not UTF-8 become lone surrogates, so their text fails alone.
            text = line.rstrip(b"\r\n").decode(errors="surrogateescape")
        yield Document(number, text, named=False)


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number, line) with the number from 1; None for a line beyond the limit."""
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
            f"{name}: {error.strerror}. Put it back and run the same command again to go on."
        ) from error


def _teller(raw: BinaryIO) -> Callable[[], int]:
    def tell() -> int:
        return 0 if raw.closed or not raw.seekable() else raw.tell()

    return tell


def _require_readable(path: Path) -> None:
    try:
        if path.is_dir():
            raise InputError(f"{path}: is a folder. Name a file, or a glob such as {path}/*.jsonl")
        if not path.is_fifo():  # the writer of a pipe would take us for its reader
            with path.open("rb"):
                pass
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}.") from None


def _reason(error: Exception) -> str:
    """Say what is wrong with a line of JSON without quoting it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number of too many digits"
