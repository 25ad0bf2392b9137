"""`embedq embed --update`: brings a finished output up to date with a changed input.

New and changed documents are embedded into a delta output beside the output, which resumes after a
kill like any other. Then old and new rows are merged in the order of the input and replace the
output.
"""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from embedq.bulk import writers
from embedq.bulk.checkpoint import (
    COUNTS,
    NPY_HEADER_BYTES,
    InputChanged,
    Manifest,
    PartialFiles,
    PartialWriter,
    lock_output,
    manifest_path,
)
from embedq.bulk.readers import STDIN
from embedq.bulk.request import EmbedRequest, ProgressDisplay, RunProgress, RunSummary
from embedq.bulk.run import EmbedRun, finish, fresh_manifest, iter_batches
from embedq.client import Client
from embedq.errors import InputError, writing
from embedq.jobs.batches import Document
from embedq.protocol.contract import VectorSpec
from embedq.protocol.values import ITEM_BYTES, NUMPY_DTYPES, Vectors

#: Returned instead of a row for a document that must be embedded.
TO_EMBED: Final = -1

#: Use of a row of the old output. RowIndex prefers rows with the lowest value.
UNUSED, SUPERSEDED, KEPT = 0, 1, 2

#: Number of rows merged at a time.
CHUNK_ROWS: Final = 4_096

#: Line number in the plan of a document that has an id in its file.
NAMED: Final = -1

#: Plan entry of one document: its row in the old output or TO_EMBED; its line number or NAMED.
_PLAN_ENTRY: Final = struct.Struct("<qq")


class RowIndex:
    """Finds the row of a document in an output by id and text hash, with a database on disk."""

    def __init__(self, path: Path, items: Path) -> None:
        """Index the items of an output.

        Args:
            path: file of the index, which must not exist.
            items: file with one JSON object per line, in row order.

        Raises:
            InputError: the items are damaged.
        """
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE rows (row INTEGER PRIMARY KEY, id BLOB, hash TEXT, use INT)")
        try:
            with items.open(encoding="utf-8") as lines:
                self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, 0)", map(_index_row, lines))
        except (ValueError, KeyError, TypeError, sqlite3.IntegrityError) as error:
            raise InputError(
                f"{items}: lacks the format that embedq writes. Start over with --restart."
            ) from error
        # With `use` last, both indexes find an unused row among many equal ones at once.
        self._db.execute("CREATE INDEX by_id ON rows (id, hash, use)")
        self._db.execute("CREATE INDEX by_hash ON rows (hash, use)")

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    def reset(self) -> None:
        """Mark all rows as unused."""
        self._db.execute("UPDATE rows SET use = ? WHERE use != ?", (UNUSED, UNUSED))

    def count_unused(self) -> int:
        """Return the number of rows that are neither kept nor superseded."""
        (n,) = self._db.execute("SELECT COUNT(*) FROM rows WHERE use = ?", (UNUSED,)).fetchone()
        return int(n)

    def find(self, document: Document, digest: str) -> int:
        """Return the row with the id and the text of a document and mark it kept, or TO_EMBED.

        A document without an id in the file is found by its text alone. Equal documents get
        different rows while there are enough, and then share them.

        Args:
            document: the document.
            digest: hash of its text; empty for a refused text.
        """
        if not digest:
            return TO_EMBED
        if document.named:
            return self._mark("id = ? AND hash = ?", (_key(document.id), digest), KEPT)
        return self._mark("hash = ?", (digest,), KEPT)

    def supersede(self, name: str | int) -> bool:
        """Mark an unused row of this id as superseded; return False if there is none."""
        return self._mark("id = ? AND use = 0", (_key(name),), SUPERSEDED) != TO_EMBED

    def _mark(self, where: str, values: tuple[str | bytes, ...], use: int) -> int:
        query = f"SELECT row, use FROM rows WHERE {where} ORDER BY use LIMIT 1"
        found = self._db.execute(query, values).fetchone()
        if found is None:
            return TO_EMBED
        row, before = found
        if use != before:
            self._db.execute("UPDATE rows SET use = ? WHERE row = ?", (use, row))
        return int(row)


def _key(name: str | int) -> bytes:
    return str(name).encode(errors="surrogatepass")


def _index_row(line: str) -> tuple[int, bytes, str]:
    item = json.loads(line)
    # A failed text has no vector to reuse; find() never matches an empty hash.
    digest = item["text_hash"] if item["status"] == "ok" else ""
    return item["row"], _key(item["id"]), digest


class UpdateRun:
    """One run of the command with --update."""

    def __init__(
        self, client: Client, request: EmbedRequest, display: ProgressDisplay, began: float
    ) -> None:
        """Prepare a run; see EmbedRun for the arguments."""
        self._client = client
        self._request = request
        self._display = display
        self._began = began
        self._counts: dict[str, int] = {}
        self._input_end = (0, "")  # batches and digest of the input
        self._has_read = False

    def run(self) -> RunSummary:
        """Embed new and changed documents, keep unchanged rows and drop removed ones.

        Raises:
            InputError: there is no finished output, or an input or the output cannot be used.
            InputChanged: the output was made with other settings.
            QueueUnavailable, NoWorker, ResultError: see Client.encode.
        """
        output = self._request.output
        writers.require_writable(output)
        spec = self._request.spec(self._client)
        with lock_output(output), _scratch_folder(output) as scratch:
            fresh = fresh_manifest(self._client, self._request, spec)
            before = self._finish_old_output(fresh, spec)
            old = writers.open_rows(output, scratch, spec.dim, spec.dtype)
            index = RowIndex(scratch / "index", old.items_path)
            with closing(index), (scratch / "plan").open("w+b") as plan:
                found = (index.count_unused(), old.vectors_path.stat().st_size)
                row_bytes = ITEM_BYTES[spec.dtype] * spec.dim
                if found != (before.rows, NPY_HEADER_BYTES + row_bytes * before.rows):
                    raise InputError(
                        f"{output}: has other rows than its manifest says; another program "
                        "changed it. Start over with --restart."
                    )
                delta = self._embed_delta(fresh, index, plan, spec)
                self._counts["removed"] = index.count_unused()
                return self._merge(fresh, old, plan, delta, spec.dim)

    def _finish_old_output(self, fresh: Manifest, spec: VectorSpec) -> Manifest:
        output = self._request.output
        before = Manifest.load(manifest_path(output))
        if before is None or not before.embedded:
            raise InputError(
                f"{output}: no finished output to update. Run the command without --update first."
            )
        # An update may change the inputs. Other settings would mix incompatible vectors.
        before.inputs, before.engine = fresh.inputs, fresh.engine
        before.check_compatible(fresh)
        finish(output, before, spec.dim)
        return before

    def _embed_delta(
        self, fresh: Manifest, index: RowIndex, plan: BinaryIO, spec: VectorSpec
    ) -> RunSummary:
        delta = writers.delta_path(self._request.output)

        def documents(progress: RunProgress) -> Iterator[Document]:
            return self._documents_to_embed(progress, index, plan, spec)

        def embed(*, restart: bool) -> RunSummary:
            request = replace(self._request, output=delta, restart=restart)
            run = EmbedRun(self._client, request, self._display, self._began, documents=documents)
            return run.run()

        # First resume the delta of a killed update; start over if the input has changed since.
        try:
            return embed(restart=False)
        except InputChanged:
            if self._has_read:
                self._require_rereadable(fresh)
        return embed(restart=True)

    def _require_rereadable(self, fresh: Manifest) -> None:
        # A pipe cannot be read again; without the delta, the next run reads it from the beginning.
        for name in fresh.inputs["files"]:
            if name == STDIN or not Path(name).is_file():
                self._delete_delta(fresh)
                raise InputError(
                    f"{'Standard input' if name == STDIN else name}: differs from the input of a "
                    "killed update, and can be read only once. The files of that update were "
                    "deleted and the output is unchanged: run the same command again."
                )

    def _delete_delta(self, fresh: Manifest) -> None:
        # An empty manifest first: after a kill in the middle, the next run starts over.
        delta = writers.delta_path(self._request.output)
        Manifest(fresh.settings, fresh.inputs, fresh.engine).save(manifest_path(delta))
        PartialFiles(delta).remove()
        for path in (*writers.files_of(delta), manifest_path(delta)):
            path.unlink(missing_ok=True)

    def _documents_to_embed(
        self, progress: RunProgress, index: RowIndex, plan: BinaryIO, spec: VectorSpec
    ) -> Iterator[Document]:
        # Yields the documents that the old output lacks, and writes the plan of all documents.
        self._has_read = True
        plan.seek(0)
        plan.truncate()
        index.reset()
        self._counts = dict.fromkeys(("new", "changed", "kept", "removed"), 0)
        self._input_end = (0, "")
        documents = self._request.documents(progress)
        for batch in iter_batches(documents, lambda texts: self._client.split(texts, spec)):
            for document, digest in zip(batch.documents, batch.hashes, strict=True):
                row = index.find(document, digest)
                plan.write(_PLAN_ENTRY.pack(row, NAMED if document.named else int(document.id)))
                if row == TO_EMBED:
                    replaces = document.named and index.supersede(document.id)
                    self._counts["changed" if replaces else "new"] += 1
                    yield document
                else:
                    self._counts["kept"] += 1
            self._input_end = (batch.text_batch.index + 1, batch.digest)

    def _merge(
        self, manifest: Manifest, old: writers.Unpacked, plan: BinaryIO, delta: RunSummary, dim: int
    ) -> RunSummary:
        output = self._request.output
        _merge_rows(output, manifest, old, plan, dim)
        manifest.skipped = delta.skipped_lines
        manifest.batches, manifest.digest = self._input_end
        written = finish(output, manifest, dim)
        self._delete_delta(manifest)
        return replace(
            delta,
            **{name: manifest.counts[name] for name in COUNTS},  # type: ignore[arg-type] # mypy sees one type for all fields
            total=manifest.rows,
            outputs=[str(path) for path in written],
            updated=self._counts,
        )


@contextmanager
def _scratch_folder(output: Path) -> Iterator[Path]:
    path = output.with_name(output.name + ".update")
    shutil.rmtree(path, ignore_errors=True)  # left by a killed run
    try:
        with writing(path):
            path.mkdir()
            try:
                yield path
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
                    raise
                # As an OSError, which writing() reports as a full disk.
                raise OSError(errno.ENOSPC, str(error)) from error
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _merge_rows(
    output: Path, manifest: Manifest, old: writers.Unpacked, plan: BinaryIO, dim: int
) -> None:
    delta = writers.delta_path(output)
    old_vectors, new_vectors = _rows_of(old.vectors_path), _rows_of(delta)
    offsets = _line_offsets(old.items_path)
    new_row = 0
    plan.seek(0)
    with (
        closing(PartialWriter(output, manifest)) as writer,
        old.items_path.open("rb") as old_items,
        writers.sidecar_path(delta).open("rb") as new_items,
    ):
        while chunk := plan.read(_PLAN_ENTRY.size * CHUNK_ROWS):
            shape = (len(chunk) // _PLAN_ENTRY.size, dim)
            merged: Vectors = np.empty(shape, NUMPY_DTYPES[manifest.dtype])
            lines = []
            for at, (row, number) in enumerate(_PLAN_ENTRY.iter_unpack(chunk)):
                if row == TO_EMBED:
                    merged[at] = new_vectors[new_row]
                    line = new_items.readline()
                    new_row += 1
                else:
                    merged[at] = old_vectors[row]
                    old_items.seek(int(offsets[row]))
                    line = old_items.readline()
                lines.append(_count_and_renumber(line, number, manifest))
            writer.write(merged, lines)
        manifest.vectors_bytes, manifest.items_bytes = writer.sync()


def _count_and_renumber(line: bytes, number: int, manifest: Manifest) -> str:
    item: dict[str, Any] = json.loads(line)
    item["row"] = manifest.rows
    if number != NAMED:
        item["id"] = number  # the current line of the text
    manifest.rows += 1
    manifest.tokens += item["n_tokens"]
    manifest.counts[item["status"]] += 1
    for name in ("truncated", "rerouted"):
        manifest.counts[name] += bool(item[name])
    return json.dumps(item) + "\n"


def _rows_of(path: Path) -> Vectors:
    if path.stat().st_size <= NPY_HEADER_BYTES:
        return np.empty((0, 0), np.float32)  # an empty file cannot be mapped
    vectors: Vectors = np.load(path, mmap_mode="r")
    return vectors


def _line_offsets(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    # int64 [n]: only eight bytes per row, so that memory stays small for large outputs.
    with path.open("rb") as lines:
        lengths = np.fromiter((len(line) for line in lines), np.int64)
    return np.cumsum(lengths) - lengths
