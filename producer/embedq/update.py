"""`embedq embed --update`: bring a finished output up to date with a changed input.

New and changed documents are embedded into an output of their own, which can be killed and goes on
like any other. Then old and new rows are merged in the order of the input, and replace the output.
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from embedq import outputs
from embedq.client import Client
from embedq.contract import VectorSpec
from embedq.embedding import EmbedRun, fresh_manifest
from embedq.errors import InputError
from embedq.files import Document
from embedq.pieces import Piece, pieces
from embedq.report import Display, Progress, Summary
from embedq.request import Request
from embedq.resume import (
    COUNTS,
    NPY_HEADER_BYTES,
    InputChanged,
    Manifest,
    Spool,
    manifest_path,
)
from embedq.vectors import Vectors

#: Rows merged at a time.
CHUNK_ROWS: Final = 4_096
#: Stands in the plan for a document that has to be embedded.
TO_EMBED: Final = -1


@dataclass(slots=True)
class _Counts:
    """What an update did."""

    new: int = 0
    changed: int = 0
    kept: int = 0
    removed: int = 0


class UpdateRun:
    """One run of the command with --update."""

    def __init__(self, client: Client, request: Request, display: Display, began: float) -> None:
        """Prepare a run; arguments as EmbedRun."""
        self._client = client
        self._request = request
        self._display = display
        self._began = began
        self._counts = _Counts()
        self._last: Piece | None = None
        self._rows = 0

    def run(self) -> Summary:
        """Embed what is new or changed, keep the rest, drop what is gone.

        Raises:
            InputError: there is no finished output, or it was made with other settings.
            QueueUnavailable, NoNode, ResultError: as Client.encode.
        """
        output = self._request.output
        outputs.require_writable(output)
        before = self._finished_manifest()
        spec = self._request.spec(self._client)
        fresh = fresh_manifest(self._client, self._request, spec)
        # Other files or names are what an update is for; other settings would mix vectors.
        replace_inputs(before, fresh)
        before.refuse_change(fresh)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
            old = outputs.unpack(output, Path(scratch), spec.dim)
            index = RowIndex(Path(scratch) / "index", old.items_path)
            plan = (Path(scratch) / "plan").open("w+b")
            with plan:
                delta = self._embed_delta(index, plan, spec)
                self._counts.removed = index.n_rows - index.n_used - self._counts.changed
                return self._merge(fresh, old, plan, delta, spec)

    def _finished_manifest(self) -> Manifest:
        output = self._request.output
        manifest = Manifest.load(manifest_path(output))
        if manifest is None or not manifest.complete or not output.exists():
            raise InputError(
                f"{output}: no finished output to update. Run the command without --update first."
            )
        return manifest

    def _embed_delta(self, index: RowIndex, plan: BinaryIO, spec: VectorSpec) -> Summary:
        """Embed what is new or changed, going on from a killed update if it fits."""
        request = replace(self._request, output=self._delta_path())

        def documents(progress: Progress) -> Iterator[Document]:
            return self._to_embed(progress, index, plan, spec)

        for restart in (False, True):
            attempt = replace(request, restart=restart)
            run = EmbedRun(self._client, attempt, self._display, self._began, documents=documents)
            try:
                return run.run()
            except InputChanged:
                if restart:
                    raise
        raise RuntimeError("An update neither ended nor failed. This is a bug.")

    def _to_embed(
        self, progress: Progress, index: RowIndex, plan: BinaryIO, spec: VectorSpec
    ) -> Iterator[Document]:
        """Yield the documents that the old output lacks, and note for each where its row is."""
        plan.seek(0)
        plan.truncate()
        index.forget_use()
        self._counts, self._rows, self._last = _Counts(), 0, None
        documents = self._request.documents(progress)
        for piece in pieces(documents, lambda texts: self._client.split(texts, spec)):
            for document, digest in zip(piece.documents, piece.hashes, strict=True):
                row = index.find(document, digest)
                plan.write(row.to_bytes(8, "little", signed=True))
                if row == TO_EMBED:
                    known = document.named and index.knows(document.id)
                    self._counts.changed += known
                    self._counts.new += not known
                    yield document
                else:
                    self._counts.kept += 1
            self._rows += len(piece.documents)
            self._last = piece

    def _merge(
        self,
        manifest: Manifest,
        old: outputs.Unpacked,
        plan: BinaryIO,
        delta: Summary,
        spec: VectorSpec,
    ) -> Summary:
        output, delta_path = self._request.output, self._delta_path()
        spool = Spool(output, manifest)
        try:
            _merge_rows(spool, manifest, old, plan, delta_path, spec.dim)
            manifest.vectors_bytes, manifest.items_bytes = spool.sync()
        finally:
            spool.close()
        manifest.rows, manifest.complete = self._rows, True
        if self._last is not None:
            manifest.batches, manifest.digest = self._last.slice.index + 1, self._last.digest
        written = outputs.finish(output, spool, manifest.rows, spec.dim)
        manifest.save(manifest_path(output))
        for path in (delta_path, outputs.sidecar_path(delta_path), manifest_path(delta_path)):
            path.unlink(missing_ok=True)
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

    def _delta_path(self) -> Path:
        output = self._request.output
        return output.with_name(output.name + ".update.npy")


class RowIndex:
    """Where each document of an output is, by id and by hash of its text; on disk."""

    def __init__(self, path: Path, items: Path) -> None:
        """Read the items of an output.

        Args:
            path: of the index, thrown away with its folder.
            items: one JSON object a line, in row order.
        """
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE rows (row INTEGER PRIMARY KEY, id TEXT, hash TEXT)")
        with items.open(encoding="utf-8") as lines:
            self._db.executemany("INSERT INTO rows VALUES (?, ?, ?)", map(_index_row, lines))
        self._db.execute("CREATE INDEX by_id ON rows (id)")
        self._db.execute("CREATE INDEX by_hash ON rows (hash)")
        (self.n_rows,) = self._db.execute("SELECT COUNT(*) FROM rows").fetchone()
        self._used = bytearray(self.n_rows)

    @property
    def n_used(self) -> int:
        """How many rows were found at least once."""
        return sum(self._used)

    def forget_use(self) -> None:
        """Start counting anew."""
        self._used = bytearray(self.n_rows)

    def find(self, document: Document, digest: str) -> int:
        """Return the row that holds this text under this id, or TO_EMBED.

        A document that the file gives no id is found by its text alone, wherever it moved.
        """
        if not digest:
            return TO_EMBED
        query, values = "SELECT row FROM rows WHERE hash = ?", [digest]
        if document.named:
            query, values = query + " AND id = ?", [digest, str(document.id)]
        found = self._db.execute(query + " LIMIT 1", values).fetchone()
        if found is None:
            return TO_EMBED
        self._used[found[0]] = 1
        return int(found[0])

    def knows(self, name: str | int) -> bool:
        """Tell whether the output has a document of this id."""
        query = "SELECT 1 FROM rows WHERE id = ? LIMIT 1"
        return self._db.execute(query, [str(name)]).fetchone() is not None


def replace_inputs(before: Manifest, now: Manifest) -> None:
    """Let the inputs and the local engine of a manifest be those of this run."""
    before.inputs, before.engine = now.inputs, now.engine


def _index_row(line: str) -> tuple[int, str, str]:
    item = json.loads(line)
    # A failed text has no vector worth keeping: an empty hash is never found.
    digest = item["text_hash"] if item["status"] == "ok" else ""
    return item["row"], str(item["id"]), digest


def _merge_rows(
    spool: Spool,
    manifest: Manifest,
    old: outputs.Unpacked,
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
        outputs.sidecar_path(delta).open("rb") as new_items,
    ):
        while chunk := plan.read(8 * CHUNK_ROWS):
            rows = np.frombuffer(chunk, "<i8")
            merged = np.empty((len(rows), dim), np.float32)
            lines = []
            for at, row in enumerate(rows.tolist()):
                if row == TO_EMBED:
                    merged[at] = new_vectors[new_row]
                    line = new_items.readline()
                    new_row += 1
                else:
                    merged[at] = old_vectors[row]
                    old_items.seek(int(offsets[row]))
                    line = old_items.readline()
                lines.append(_renumbered(line, manifest))
            spool.write(merged, lines)


def _renumbered(line: bytes, manifest: Manifest) -> str:
    item: dict[str, Any] = json.loads(line)
    item["row"] = manifest.rows
    manifest.rows += 1
    manifest.tokens += item["n_tokens"]
    manifest.counts[item["status"]] += 1
    for name in ("truncated", "cached", "rerouted"):
        manifest.counts[name] += bool(item[name])
    return json.dumps(item) + "\n"


def _rows_of(path: Path) -> Vectors:
    if path.stat().st_size <= NPY_HEADER_BYTES:
        return np.empty((0, 0), np.float32)  # nothing to map
    vectors: Vectors = np.load(path, mmap_mode="r")
    return vectors


def _line_offsets(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return where each line of a file begins, int64 [n]; eight bytes a row is all that grows."""
    lengths = []
    with path.open("rb") as lines:
        lengths = [len(line) for line in lines]
    return np.concatenate([[0], np.cumsum(np.array(lengths, np.int64))]).astype(np.int64)
