"""`embedq embed --update`.

The rows of an output by id and by text, so that an update finds those that it can keep.

`embedq embed --update`: bring a finished output up to date with a changed input.

New and changed documents are embedded into an output of their own, which can be killed and goes on
like any other. Then old and new rows are merged in the order of the input, and replace the output.
"""

from __future__ import annotations

import errno
import json
import shutil
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
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
from embedq.bulk.run import EmbedRun, InputBatch, finish, fresh_manifest, iter_batches
from embedq.client import Client
from embedq.errors import InputError, writing
from embedq.jobs.batches import Document
from embedq.protocol.contract import VectorSpec
from embedq.protocol.values import DESCRIPTIONS, ITEM_BYTES, Vectors

#: Stands for a row that is not there: the document has to be embedded.
TO_EMBED: Final = -1


#: What became of a row of the old output; rows that may still be given away come first.
UNUSED, SUPERSEDED, KEPT = 0, 1, 2


class RowIndex:
    """Where each document of an output is, by id and by hash of its text; on disk."""

    def __init__(self, path: Path, items: Path) -> None:
        """Read the items of an output.

        Args:
            path: of the index, thrown away with its folder.
            items: one JSON object a line, in row order.

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
                f"{items}: is not what embedq wrote. Start over with --restart."
            ) from error
        # The use comes last in both, so that the free row of many equal ones is found at once.
        self._db.execute("CREATE INDEX by_id ON rows (id, hash, use)")
        self._db.execute("CREATE INDEX by_hash ON rows (hash, use)")

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    def forget_use(self) -> None:
        """Start counting anew."""
        self._db.execute("UPDATE rows SET use = ? WHERE use != ?", (UNUSED, UNUSED))

    def count_unused(self) -> int:
        """Count the rows that no document was found in, nor superseded."""
        (n,) = self._db.execute("SELECT COUNT(*) FROM rows WHERE use = ?", (UNUSED,)).fetchone()
        return int(n)

    def find(self, document: Document, digest: str) -> int:
        """Return the row that holds this text under this id, or TO_EMBED.

        A document that the file gives no id is found by its text alone, wherever it moved. Equal
        documents are given equal rows in turn, and share them when there are too few.
        """
        if not digest:
            return TO_EMBED
        if document.named:
            return self._use("id = ? AND hash = ?", (_key(document.id), digest), KEPT)
        return self._use("hash = ?", (digest,), KEPT)

    def supersede(self, name: str | int) -> bool:
        """Give up a row of this id for a document that takes its place; False if there is none."""
        return self._use("id = ? AND use = 0", (_key(name),), SUPERSEDED) != TO_EMBED

    def _use(self, where: str, values: tuple[str | bytes, ...], use: int) -> int:
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
    # A failed text has no vector worth keeping: an empty hash is never found.
    digest = item["text_hash"] if item["status"] == "ok" else ""
    return item["row"], _key(item["id"]), digest


#: Rows merged at a time.
CHUNK_ROWS: Final = 4_096


#: Stands in the plan for a document whose id the file gives; else it is the number of its line.
NAMED: Final = -1


#: One document in the plan: its row in the old output, and the number of its line.
_STEP: Final = struct.Struct("<qq")


@dataclass(slots=True)
class _Counts:
    """What an update did."""

    new: int = 0
    changed: int = 0
    kept: int = 0
    removed: int = 0


class UpdateRun:
    """One run of the command with --update."""

    def __init__(
        self, client: Client, request: EmbedRequest, display: ProgressDisplay, began: float
    ) -> None:
        """Prepare a run; arguments as EmbedRun."""
        self._client = client
        self._request = request
        self._display = display
        self._began = began
        self._counts = _Counts()
        self._last: InputBatch | None = None
        self._rows = 0
        self._has_read = False

    def run(self) -> RunSummary:
        """Embed what is new or changed, keep the rest, drop what is gone.

        Raises:
            InputError: there is no finished output, or it was made with other settings.
            QueueUnavailable, NoWorker, ResultError: as Client.encode.
        """
        output = self._request.output
        writers.require_writable(output)
        spec = self._request.spec(self._client)
        with lock_output(output), _scratch_folder(output) as scratch:
            fresh = fresh_manifest(self._client, self._request, spec)
            before = self._finished(fresh, spec)
            old = writers.open_rows(output, scratch, spec.dim, spec.dtype)
            index = RowIndex(scratch / "index", old.items_path)
            with closing(index), (scratch / "plan").open("w+b") as plan:
                held = (index.count_unused(), old.vectors_path.stat().st_size)
                row_bytes = ITEM_BYTES[spec.dtype] * spec.dim
                if held != (before.rows, NPY_HEADER_BYTES + row_bytes * before.rows):
                    raise InputError(
                        f"{output}: holds other rows than its manifest says; something else "
                        "changed it. Start over with --restart."
                    )
                delta = self._embed_delta(fresh, index, plan, spec)
                self._counts.removed = index.count_unused()
                return self._merge(fresh, old, plan, delta, spec)

    def _finished(self, fresh: Manifest, spec: VectorSpec) -> Manifest:
        """Return the manifest of an output whose rows may be mixed with those of this run."""
        output = self._request.output
        before = Manifest.load(manifest_path(output))
        if before is None or not before.embedded:
            raise InputError(
                f"{output}: no finished output to update. Run the command without --update first."
            )
        # Other files or names are what an update is for; other settings would mix vectors.
        before.inputs, before.engine = fresh.inputs, fresh.engine
        before.check_compatible(fresh)
        finish(output, before, spec.dim)
        return before

    def _embed_delta(
        self, fresh: Manifest, index: RowIndex, plan: BinaryIO, spec: VectorSpec
    ) -> RunSummary:
        """Embed what is new or changed, going on from a killed update if it fits."""
        request = replace(self._request, output=writers.delta_path(self._request.output))

        def documents(progress: RunProgress) -> Iterator[Document]:
            return self._to_embed(progress, index, plan, spec)

        for restart in (False, True):
            attempt = replace(request, restart=restart)
            run = EmbedRun(self._client, attempt, self._display, self._began, documents=documents)
            try:
                return run.run()
            except InputChanged:
                if restart:
                    raise
                if self._has_read:
                    self._require_rereadable(fresh)
        raise RuntimeError("An update neither ended nor failed. This is a bug.")

    def _require_rereadable(self, fresh: Manifest) -> None:
        """Check that the inputs can be read from the beginning a second time.

        Raises:
            InputError: one is a pipe; what stood in its way is gone, so that the next run reads it.
        """
        for name in fresh.inputs["files"]:
            if name == STDIN or not Path(name).is_file():
                self._forget_delta(fresh)
                raise InputError(
                    f"{'Standard input' if name == STDIN else name}: is not what a killed update "
                    "had read, and can be read only once. What that update left is deleted and "
                    "the output is as it was: run the same command again."
                )

    def _forget_delta(self, fresh: Manifest) -> None:
        """Delete the delta, in an order in which a kill leaves one that is begun anew."""
        delta = writers.delta_path(self._request.output)
        Manifest(fresh.settings, fresh.inputs, fresh.engine).save(manifest_path(delta))
        PartialFiles(delta).remove()
        for path in (delta, writers.sidecar_path(delta), manifest_path(delta)):
            path.unlink(missing_ok=True)

    def _to_embed(
        self, progress: RunProgress, index: RowIndex, plan: BinaryIO, spec: VectorSpec
    ) -> Iterator[Document]:
        """Yield the documents that the old output lacks, and note for each where its row is."""
        self._has_read = True
        plan.seek(0)
        plan.truncate()
        index.forget_use()
        self._counts, self._rows, self._last = _Counts(), 0, None
        documents = self._request.documents(progress)
        for piece in iter_batches(documents, lambda texts: self._client.split(texts, spec)):
            for document, digest in zip(piece.documents, piece.hashes, strict=True):
                row = index.find(document, digest)
                plan.write(_STEP.pack(row, NAMED if document.named else int(document.id)))
                if row == TO_EMBED:
                    replaces = document.named and index.supersede(document.id)
                    self._counts.changed += replaces
                    self._counts.new += not replaces
                    yield document
                else:
                    self._counts.kept += 1
            self._rows += len(piece.documents)
            self._last = piece

    def _merge(
        self,
        manifest: Manifest,
        old: writers.Unpacked,
        plan: BinaryIO,
        delta: RunSummary,
        spec: VectorSpec,
    ) -> RunSummary:
        output = self._request.output
        spool = PartialWriter(output, manifest)
        try:
            _merge_rows(spool, manifest, old, plan, writers.delta_path(output), spec.dim)
            manifest.vectors_bytes, manifest.items_bytes = spool.sync()
        finally:
            spool.close()
        manifest.rows, manifest.skipped = self._rows, delta.skipped_lines
        if self._last is not None:
            manifest.batches, manifest.digest = self._last.slice.index + 1, self._last.digest
        written = finish(output, manifest, spec.dim)
        self._forget_delta(manifest)
        return replace(
            delta,
            **{name: manifest.counts[name] for name in COUNTS},  # type: ignore[arg-type] # mypy sees one type for all fields
            total=manifest.rows,
            outputs=[str(path) for path in written],
            updated={
                "new": self._counts.new,
                "changed": self._counts.changed,
                "kept": self._counts.kept,
                "removed": self._counts.removed,
            },
        )


@contextmanager
def _scratch_folder(output: Path) -> Iterator[Path]:
    """Make a folder beside the output, in the place of one that a killed run left."""
    path = output.with_name(output.name + ".update")
    with writing(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    try:
        with writing(path), _full_index():
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _full_index() -> Iterator[None]:
    """Say of the index, too, that the disk is full; sqlite has an error of its own for that."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        raise OSError(errno.ENOSPC, str(error)) from error


def _merge_rows(
    spool: PartialWriter,
    manifest: Manifest,
    old: writers.Unpacked,
    plan: BinaryIO,
    delta: Path,
    dim: int,
) -> None:
    """Write old and new rows into the spool in the order of the plan."""
    old_vectors, new_vectors = _rows_of(old.vectors_path), _rows_of(delta)
    offsets = _line_offsets(old.items_path)
    new_row = 0
    plan.seek(0)
    with (
        old.items_path.open("rb") as old_items,
        writers.sidecar_path(delta).open("rb") as new_items,
    ):
        while chunk := plan.read(_STEP.size * CHUNK_ROWS):
            kind = DESCRIPTIONS[manifest.dtype]
            merged: Vectors = np.empty((len(chunk) // _STEP.size, dim), kind)
            lines = []
            for at, (row, number) in enumerate(_STEP.iter_unpack(chunk)):
                if row == TO_EMBED:
                    merged[at] = new_vectors[new_row]
                    line = new_items.readline()
                    new_row += 1
                else:
                    merged[at] = old_vectors[row]
                    old_items.seek(int(offsets[row]))
                    line = old_items.readline()
                lines.append(_renumbered(line, number, manifest))
            spool.write(merged, lines)


def _renumbered(line: bytes, number: int, manifest: Manifest) -> str:
    item: dict[str, Any] = json.loads(line)
    item["row"] = manifest.rows
    if number != NAMED:
        item["id"] = number  # the line that the text is on now
    manifest.rows += 1
    manifest.tokens += item["n_tokens"]
    manifest.counts[item["status"]] += 1
    for name in ("truncated", "rerouted"):
        manifest.counts[name] += bool(item[name])
    return json.dumps(item) + "\n"


def _rows_of(path: Path) -> Vectors:
    if path.stat().st_size <= NPY_HEADER_BYTES:
        return np.empty((0, 0), np.float32)  # nothing to map
    vectors: Vectors = np.load(path, mmap_mode="r")
    return vectors


def _line_offsets(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where each line of a file begins, int64 [n]; eight bytes a row is all that grows."""
    with path.open("rb") as lines:
        lengths = np.fromiter((len(line) for line in lines), np.int64)
    return np.cumsum(lengths) - lengths
