"""Spools -> the output a person asked for: npy with its sidecar, jsonl or parquet. Streams."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from embedq.bulk.checkpoint import NPY_HEADER_BYTES, PartialFiles, npy_header
from embedq.bulk.readers import STDIN
from embedq.errors import InputError, did_you_mean, writing
from embedq.protocol.contract import Dtype
from embedq.protocol.values import DESCRIPTIONS, ITEM_BYTES, Vectors

#: Rows converted at a time.
CHUNK_ROWS: Final = 4_096


#: Bytes of what the longest name of a file beside an output has more than the output's.
LONGEST_SUFFIX: Final = len(".update.npy.vectors.partial")


def format_of(output: Path) -> str:
    """Return the format of an output by its ending.

    Raises:
        InputError: no such format.
    """
    suffix = output.suffix.removeprefix(".").lower()
    if suffix not in _FINISHERS:
        known = ", ".join(_FINISHERS)
        raise InputError(
            f"{output}: unknown ending {suffix or '(none)'}; expected one of {known}."
            f"{did_you_mean(suffix, list(_FINISHERS))}"
        )
    return suffix


def sidecar_path(output: Path) -> Path:
    """Return where the items of an npy output are: OUTPUT.npy -> OUTPUT.items.jsonl."""
    return output.with_suffix(".items.jsonl")


def files_of(output: Path) -> list[Path]:
    """Return every file that an output consists of."""
    return [output, sidecar_path(output)] if format_of(output) == "npy" else [output]


def delta_path(output: Path) -> Path:
    """Return where an update of an output keeps what it embeds anew."""
    return output.with_name(output.name + ".update.npy")


def own_files(output: Path) -> list[Path]:
    """Return the files of an output, and those that a killed update of it leaves."""
    return [*files_of(output), *files_of(delta_path(output))]


def check_not_an_input(output: Path, inputs: Sequence[str]) -> None:
    """Check that no file of the output is one of the inputs.

    Raises:
        InputError: one is.
    """
    for path in filter(Path.exists, files_of(output)):
        if any(name != STDIN and path.samefile(name) for name in inputs):
            raise InputError(f"{path}: is an input and would be overwritten. Name another output.")


def require_writable(output: Path) -> None:
    """Check before any work that the output can be written.

    Raises:
        InputError: it is a folder, its folder is missing or read-only, its name is too long, or its
            format is unknown.
    """
    kind = format_of(output)
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder. Create it: mkdir -p {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output.parent}: this folder cannot be written to.")
    size = len(os.fsencode(output.name))
    most = os.pathconf(output.parent, "PC_NAME_MAX") - LONGEST_SUFFIX
    if size > most:
        raise InputError(
            f"{output}: its name has {size:,} bytes; the limit is {most:,}, for files beside it "
            "have longer ones. Choose a shorter name."
        )
    if output.is_dir():
        raise InputError(f"{output}: is a folder. Name a file in it, such as {output}/vectors.npy")
    if kind == "parquet":
        _pyarrow()


def finalize(
    output: Path, spool: PartialFiles, rows: int, dim: int, dtype: Dtype = Dtype.FLOAT32
) -> list[Path]:
    """Turn complete spools into the output and remove them; goes on where a killed call stopped.

    Returns:
        The files of the output.

    Raises:
        InputError: the output cannot be written, there are neither spools nor output, or an npy has
            another size than it should.
    """
    kind = format_of(output)
    if spool.vectors_path.exists():
        _FINISHERS[kind](output, spool, rows, dim, dtype)
    spool.remove()
    written = files_of(output)
    for path in written:
        if not path.exists():
            raise InputError(
                f"{path}: is gone, and its manifest says that it was finished. Put it back, or "
                "start over with --restart."
            )
    size, expected = output.stat().st_size, NPY_HEADER_BYTES + ITEM_BYTES[dtype] * dim * rows
    if kind == "npy" and size != expected:
        raise InputError(
            f"{output}: has {size:,} bytes where its manifest says {expected:,}; something else "
            "changed it. Put it back, or start over with --restart."
        )
    return written


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A finished output as an npy file and its items.

    Attributes:
        vectors_path: float32 or float16 [n, D] as npy.
        items_path: one JSON object a line, in row order, without vectors.
    """

    vectors_path: Path
    items_path: Path


def open_rows(output: Path, folder: Path, dim: int, dtype: Dtype = Dtype.FLOAT32) -> Unpacked:
    """Give random access to the rows of a finished output, of whatever format.

    Args:
        output: the output; an npy is used in place.
        folder: for copies of the others, thrown away by the caller.
        dim: components of a vector.
        dtype: of the output.

    Raises:
        InputError: the output is damaged or was changed by something else.
    """
    kind = format_of(output)
    if kind == "npy":
        return Unpacked(output, sidecar_path(output))
    read = {"jsonl": _read_jsonl, "parquet": _read_parquet}[kind]
    unpacked = Unpacked(folder / "old.npy", folder / "old.items.jsonl")
    rows = 0
    kind_of_row = DESCRIPTIONS[dtype]
    missing = np.full(dim, np.nan, kind_of_row)
    with (
        writing(output),
        unpacked.vectors_path.open("wb") as vectors,
        unpacked.items_path.open("w", encoding="utf-8") as items,
    ):
        vectors.write(npy_header(0, dim, dtype))
        try:
            for rows, item in enumerate(read(output), 1):
                vector = item.pop("vector")
                row = missing if vector is None else np.array(vector, kind_of_row)
                if row.shape != (dim,):
                    raise ValueError(f"Row {rows - 1} has not {dim} components.")
                vectors.write(row.tobytes())
                items.write(json.dumps(item) + "\n")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{output}: is not what embedq wrote. Start over with --restart."
            ) from error
        vectors.seek(0)
        vectors.write(npy_header(rows, dim, dtype))
    return unpacked


def _read_jsonl(output: Path) -> Iterator[dict[str, Any]]:
    with output.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _read_parquet(output: Path) -> Iterator[dict[str, Any]]:
    _, pq = _pyarrow()
    with pq.ParquetFile(output) as file:
        for batch in file.iter_batches(CHUNK_ROWS):
            yield from batch.to_pylist()


def _finish_npy(output: Path, spool: PartialFiles, rows: int, dim: int, dtype: Dtype) -> None:
    with writing(output), spool.vectors_path.open("r+b") as vectors:
        vectors.write(npy_header(rows, dim, dtype))
        vectors.flush()
        os.fsync(vectors.fileno())
        # The sidecar first: an npy without its sidecar must not be seen.
        if spool.items_path.exists():
            spool.items_path.replace(sidecar_path(output))
        spool.vectors_path.replace(output)


def _finish_jsonl(output: Path, spool: PartialFiles, rows: int, dim: int, dtype: Dtype) -> None:
    temporary = output.with_name(output.name + ".tmp")
    with writing(output), temporary.open("w", encoding="utf-8") as out:
        for items, vectors in _chunks(spool, dim, dtype):
            for item, vector in zip(items, vectors, strict=True):
                item["vector"] = vector.tolist() if item["status"] == "ok" else None
                out.write(json.dumps(item) + "\n")
        out.flush()
        os.fsync(out.fileno())
        temporary.replace(output)


def _finish_parquet(output: Path, spool: PartialFiles, rows: int, dim: int, dtype: Dtype) -> None:
    pa, pq = _pyarrow()
    temporary = output.with_name(output.name + ".tmp")
    # Few readers of Parquet know float16, so its values are spelled as float32.
    kind = pa.list_(pa.float32(), dim)
    writer = None
    with writing(output):
        for items, vectors in _chunks(spool, dim, dtype):
            columns = {key: [item[key] for item in items] for key in items[0]}
            columns["id"] = [_as_utf8(str(name)) for name in columns["id"]]
            values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
            missing = pa.array([item["status"] != "ok" for item in items])
            columns["vector"] = pa.FixedSizeListArray.from_arrays(values, type=kind, mask=missing)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        if writer is None:
            empty = pa.schema([("id", pa.string()), ("status", pa.string()), ("vector", kind)])
            writer = pq.ParquetWriter(temporary, empty)
        writer.close()
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(output)


_FINISHERS: dict[str, Callable[[Path, PartialFiles, int, int, Dtype], None]] = {
    "npy": _finish_npy,
    "jsonl": _finish_jsonl,
    "parquet": _finish_parquet,
}


def _chunks(
    spool: PartialFiles, dim: int, dtype: Dtype
) -> Iterator[tuple[list[dict[str, Any]], Vectors]]:
    """Yield items and their vectors, a bounded number of rows at a time."""
    with (
        spool.items_path.open(encoding="utf-8") as items,
        spool.vectors_path.open("rb") as vectors,
    ):
        vectors.seek(NPY_HEADER_BYTES)
        while lines := [line for _, line in zip(range(CHUNK_ROWS), items, strict=False)]:
            raw = vectors.read(ITEM_BYTES[dtype] * dim * len(lines))
            yield (
                [json.loads(line) for line in lines],
                np.frombuffer(raw, DESCRIPTIONS[dtype]).reshape(len(lines), dim),
            )


def _as_utf8(name: str) -> str:
    """Spell out what Parquet cannot hold: half of a surrogate pair, or a byte that was no UTF-8."""
    return name.encode(errors="backslashreplace").decode()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # an optional extra, heavy
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet needs pyarrow. Run: pip install 'embedq[parquet]'") from None
    return pyarrow, pyarrow.parquet
