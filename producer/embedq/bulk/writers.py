"""Writers that turn partial files into an output: npy with its items file, jsonl or parquet.

They stream, so their memory does not grow with the output.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np

from embedq.bulk.checkpoint import NPY_HEADER_BYTES, PartialFiles, npy_header
from embedq.bulk.readers import STDIN
from embedq.errors import InputError, did_you_mean, writing
from embedq.protocol.contract import Dtype
from embedq.protocol.values import ITEM_BYTES, NUMPY_DTYPES, Vectors

#: Number of rows converted at a time.
CHUNK_ROWS: Final = 4_096

#: Bytes of the longest suffix that a file beside an output adds to its name.
LONGEST_SUFFIX: Final = len(".update.npy.vectors.partial")


def format_of(output: Path) -> str:
    """Return the format of an output by its ending.

    Raises:
        InputError: the ending is unknown.
    """
    suffix = output.suffix.removeprefix(".").lower()
    if suffix not in _FINISHERS:
        known = ", ".join(_FINISHERS)
        raise InputError(
            f"{output}: unknown ending {suffix or '(none)'}; expected one of {known}."
            f"{did_you_mean(suffix, _FINISHERS)}"
        )
    return suffix


def sidecar_path(output: Path) -> Path:
    """Return the path of the items of an npy output: OUTPUT.npy -> OUTPUT.items.jsonl."""
    return output.with_suffix(".items.jsonl")


def files_of(output: Path) -> list[Path]:
    """Return all files of an output."""
    return [output, sidecar_path(output)] if format_of(output) == "npy" else [output]


def delta_path(output: Path) -> Path:
    """Return the path of the delta output, which holds the rows that an update embeds."""
    return output.with_name(output.name + ".update.npy")


def own_files(output: Path) -> list[Path]:
    """Return the files of an output and of its delta output."""
    return [*files_of(output), *files_of(delta_path(output))]


def check_not_an_input(output: Path, inputs: Sequence[str]) -> None:
    """Check that no file of the output is an input.

    Raises:
        InputError: one is an input.
    """
    for path in filter(Path.exists, files_of(output)):
        if any(name != STDIN and path.samefile(name) for name in inputs):
            raise InputError(f"{path}: is an input and would be overwritten. Name another output.")


def require_writable(output: Path) -> None:
    """Check that the output can be written, before any work is done.

    Raises:
        InputError: the output is a folder, its folder is missing or read-only, its name is too
            long, its format is unknown, or pyarrow is missing.
    """
    kind = format_of(output)
    if not output.parent.is_dir():
        raise InputError(f"{output.parent}: no such folder. Create it: mkdir -p {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise InputError(f"{output.parent}: this folder is not writable. Choose another folder.")
    size = len(os.fsencode(output.name))
    most = os.pathconf(output.parent, "PC_NAME_MAX") - LONGEST_SUFFIX
    if size > most:
        raise InputError(
            f"{output}: its name has {size:,} bytes; the limit is {most:,}, because files beside "
            "it have longer names. Choose a shorter name."
        )
    if output.is_dir():
        raise InputError(f"{output}: is a folder. Name a file in it, such as {output}/vectors.npy")
    if kind == "parquet":
        _pyarrow()


def finalize(
    output: Path, partial: PartialFiles, rows: int, dim: int, dtype: Dtype = Dtype.FLOAT32
) -> list[Path]:
    """Turn complete partial files into the output and remove them; safe to repeat after a kill.

    Returns:
        The files of the output.

    Raises:
        InputError: the output cannot be written, partial files and output are both missing, or an
            npy output has the wrong size.
    """
    kind = format_of(output)
    if partial.vectors_path.exists():
        _FINISHERS[kind](output, partial, rows, dim, dtype)
    partial.remove()
    written = files_of(output)
    for path in written:
        if not path.exists():
            raise InputError(
                f"{path}: is missing, although its manifest says that it is finished. Restore it, "
                "or start over with --restart."
            )
    size, expected = output.stat().st_size, NPY_HEADER_BYTES + ITEM_BYTES[dtype] * dim * rows
    if kind == "npy" and size != expected:
        raise InputError(
            f"{output}: has {size:,} bytes where its manifest says {expected:,}; another program "
            "changed it. Restore it, or start over with --restart."
        )
    return written


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A finished output as an npy file and an items file.

    Attributes:
        vectors_path: npy file, float32 or float16 [n, D].
        items_path: one JSON object per line, in row order, without vectors.
    """

    vectors_path: Path
    items_path: Path


def open_rows(output: Path, folder: Path, dim: int, dtype: Dtype = Dtype.FLOAT32) -> Unpacked:
    """Convert a finished output of any format to an npy file and an items file.

    Args:
        output: the output; an npy output is used in place.
        folder: folder for converted files; the caller deletes it.
        dim: components of a vector.
        dtype: type of the vectors in the output.

    Raises:
        InputError: the output is damaged.
    """
    if format_of(output) == "npy":
        return Unpacked(output, sidecar_path(output))
    read = {"jsonl": _read_jsonl, "parquet": _read_parquet}[format_of(output)]
    unpacked = Unpacked(folder / "old.npy", folder / "old.items.jsonl")
    rows = 0
    row_type = NUMPY_DTYPES[dtype]
    failed = np.full(dim, np.nan, row_type)
    with (
        writing(output),
        unpacked.vectors_path.open("wb") as vectors,
        unpacked.items_path.open("w", encoding="utf-8") as items,
    ):
        vectors.write(npy_header(0, dim, dtype))
        try:
            for rows, item in enumerate(read(output), 1):
                vector = item.pop("vector")
                row = failed if vector is None else np.array(vector, row_type)
                if row.shape != (dim,):
                    raise ValueError(f"Row {rows - 1} has shape {row.shape}, expected ({dim},).")
                vectors.write(row.tobytes())
                items.write(json.dumps(item) + "\n")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{output}: lacks the format that embedq writes. Start over with --restart."
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


def _finish_npy(output: Path, partial: PartialFiles, rows: int, dim: int, dtype: Dtype) -> None:
    with writing(output), partial.vectors_path.open("r+b") as vectors:
        vectors.write(npy_header(rows, dim, dtype))
        vectors.flush()
        os.fsync(vectors.fileno())
        # Items first: readers must never see an npy without its items.
        if partial.items_path.exists():
            partial.items_path.replace(sidecar_path(output))
        partial.vectors_path.replace(output)


def _finish_jsonl(output: Path, partial: PartialFiles, rows: int, dim: int, dtype: Dtype) -> None:
    temporary = output.with_name(output.name + ".tmp")
    with writing(output), temporary.open("w", encoding="utf-8") as out:
        for items, vectors in _chunks(partial, dim, dtype):
            for item, vector in zip(items, vectors, strict=True):
                item["vector"] = vector.tolist() if item["status"] == "ok" else None
                out.write(json.dumps(item) + "\n")
        out.flush()
        os.fsync(out.fileno())
        temporary.replace(output)


def _finish_parquet(output: Path, partial: PartialFiles, rows: int, dim: int, dtype: Dtype) -> None:
    pa, pq = _pyarrow()
    temporary = output.with_name(output.name + ".tmp")
    # Few readers of Parquet support float16, so its values are written as float32.
    kind = pa.list_(pa.float32(), dim)
    writer = None
    with writing(output):
        for items, vectors in _chunks(partial, dim, dtype):
            columns = {key: [item[key] for item in items] for key in items[0]}
            # Parquet strings hold no lone surrogates, which stand for invalid UTF-8 in an id.
            names = (str(name).encode(errors="backslashreplace") for name in columns["id"])
            columns["id"] = [name.decode() for name in names]
            values = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
            failed = pa.array([item["status"] != "ok" for item in items])
            columns["vector"] = pa.FixedSizeListArray.from_arrays(values, type=kind, mask=failed)
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
    partial: PartialFiles, dim: int, dtype: Dtype
) -> Iterator[tuple[list[dict[str, Any]], Vectors]]:
    with (
        partial.items_path.open(encoding="utf-8") as items,
        partial.vectors_path.open("rb") as vectors,
    ):
        vectors.seek(NPY_HEADER_BYTES)
        while lines := list(islice(items, CHUNK_ROWS)):
            raw = vectors.read(ITEM_BYTES[dtype] * dim * len(lines))
            yield (
                [json.loads(line) for line in lines],
                np.frombuffer(raw, NUMPY_DTYPES[dtype]).reshape(len(lines), dim),
            )


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # optional and slow to import
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet needs pyarrow. Run: pip install 'embedq[parquet]'") from None
    return pyarrow, pyarrow.parquet
