"""Run `embedq embed`.

Documents -> numbered pieces: a batch with the names and hashes of its documents.

The digest of a piece covers everything before it too, so one comparison tells whether an input is
still the one that an output was made of.

`embedq embed` as a whole: documents in, batches through a job, rows and items onto disk.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from embedq.bulk import writers
from embedq.bulk.checkpoint import (
    InputChanged,
    Manifest,
    PartialFiles,
    PartialWriter,
    lock_output,
    manifest_path,
)
from embedq.bulk.request import EmbedRequest, ProgressDisplay, RunProgress, RunSummary
from embedq.client import Client
from embedq.errors import InputError
from embedq.jobs.batches import BatchResult, Document, TextBatch
from embedq.protocol.contract import MAX_TEXT_BYTES, Code, Status, VectorSpec, refusal
from embedq.protocol.values import REROUTED, TRUNCATED, OutcomeTable

#: Hex characters of a text's hash in the items: 64 bits, so that two versions of a document never
#: share one in practice.
HASH_CHARACTERS = 16


#: Takes the place of a refused text: refused for the same reason, and one for all.
_STAND_INS: dict[Code, object] = {
    Code.NOT_A_STRING: None,
    Code.TEXT_TOO_LARGE: "x" * (MAX_TEXT_BYTES + 1),
    Code.NUL_CHARACTER: "\0",
    Code.NOT_UNICODE: "\ud800",
}


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A batch on its way.

    Attributes:
        slice: the texts.
        documents: where they come from; a refused one has a small text that is refused as well.
        hashes: of each text; empty for a refused one.
        digest: of all documents up to the end of this piece.
    """

    slice: TextBatch
    documents: list[Document]
    hashes: list[str]
    digest: str


def iter_batches(
    documents: Iterable[Document], split: Callable[[Iterable[object]], Iterator[TextBatch]]
) -> Iterator[InputBatch]:
    """Cut documents into pieces.

    Args:
        documents: in order.
        split: cuts texts into batches.
    """
    waiting: list[Document] = []

    def texts() -> Iterator[object]:
        for document in map(_slim, documents):
            waiting.append(document)
            yield document.text

    digest = ""
    for part in split(texts()):
        n = len(part)
        here, waiting[:n] = waiting[:n], []
        hashes = [
            "" if offset in part.refused else text_hash(text)
            for offset, text in enumerate(part.texts)
        ]
        digest = _chain(digest, here, hashes)
        yield InputBatch(part, here, hashes, digest)


def _slim(document: Document) -> Document:
    """Return a document without the text that nobody will embed: a batch may hold 4,096 of them."""
    code = refusal(document.text)
    return document if code is Code.NONE else replace(document, text=_STAND_INS[code])


def text_hash(text: str) -> str:
    """Return the hash by which a text is known in the items."""
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]


def _chain(before: str, documents: list[Document], hashes: list[str]) -> str:
    state = hashlib.sha256(before.encode())
    state.update(json.dumps([[document.id for document in documents], hashes]).encode())
    return state.hexdigest()


#: A checkpoint is due after this many seconds, or this share of the window of batches.
CHECKPOINT_EVERY_S, CHECKPOINT_SHARE = 5.0, 0.25


_FLAGS = (("truncated", TRUNCATED), ("rerouted", REROUTED))


class EmbedRun:
    """One run of the command."""

    def __init__(
        self,
        client: Client,
        request: EmbedRequest,
        display: ProgressDisplay,
        began: float,
        *,
        documents: Callable[[RunProgress], Iterable[Document]] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            client: to publish with.
            request: what to do.
            display: shows progress.
            began: monotonic seconds at which the command began.
            documents: what to embed instead of everything in the inputs.
        """
        self._client = client
        self._request = request
        self._display = display
        self._began = began
        self._documents = documents or request.documents
        self._path = manifest_path(request.output)
        self._progress = RunProgress()
        self._devices: Counter[str] = Counter()
        self._on_the_way: dict[int, InputBatch] = {}
        self._refusals: set[tuple[str, str]] = set()

    def run(self) -> RunSummary:
        """Embed everything that the output does not hold yet.

        Raises:
            InputError: an input or the output cannot be used.
            InputChanged: an input or a setting changed since the last run.
            QueueUnavailable, NoWorker, ResultError: as Client.encode.
        """
        output = self._request.output
        writers.require_writable(output)
        spec = self._request.spec(self._client)
        with lock_output(output):
            manifest = self._manifest(spec)
            if manifest.embedded:
                self._require_unchanged(manifest, spec)
                self._display.note(f"{output} is complete already; nothing to embed.")
            else:
                # First, as opening cuts the spools to what this manifest vouches for.
                manifest.save(self._path)
                spool = PartialWriter(output, manifest)
                try:
                    self._embed(manifest, spec, spool)
                finally:
                    spool.close()
            return self._summary(manifest, finish(output, manifest, spec.dim))

    def _embed(self, manifest: Manifest, spec: VectorSpec, spool: PartialWriter) -> None:
        per_checkpoint = max(1, int(self._client.window() * CHECKPOINT_SHARE))
        job = self._client.job(
            self._missing(manifest, spec),
            spec,
            label=self._request.output.name.encode(errors="replace").decode(),
            # What is not on disk yet counts as in flight, so that a kill costs one window at most.
            spare=per_checkpoint,
            refusable=False,
        )
        manifest.job = job.id
        manifest.save(self._path)
        unsaved, saved_at = 0, time.monotonic()
        for batch in job.batches():
            piece = self._on_the_way.pop(batch.slice.index)
            self._write(spool, manifest, piece, batch)
            unsaved += 1
            if unsaved >= per_checkpoint or time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                self._checkpoint(manifest, spool)
                unsaved, saved_at = 0, time.monotonic()
            self._display.update(self._progress)
        self._checkpoint(manifest, spool)

    def _manifest(self, spec: VectorSpec) -> Manifest:
        """Return the manifest to go on from: the one beside the output, or a new one."""
        output = self._request.output
        fresh = fresh_manifest(self._client, self._request, spec)
        if self._request.restart:
            with suppress(InputError):  # a damaged manifest is one more reason to start over
                self._forget_old_job(Manifest.load(self._path))
            return fresh
        found = Manifest.load(self._path)
        if found is not None:
            found.check_compatible(fresh)
            found.settings, found.inputs = fresh.settings, fresh.inputs
            self._forget_old_job(found)
            self._progress.resumed = found.rows
            self._progress.truncated = found.counts["truncated"]
            self._progress.failed = found.counts["failed"]
            return found
        for path in filter(Path.exists, writers.files_of(output)):
            raise InputError(
                f"{path}: exists and has no manifest beside it, so it is not an unfinished "
                "output of this command. Name another, or replace it with --restart."
            )
        return fresh

    def _forget_old_job(self, manifest: Manifest | None) -> None:
        """Drop what a killed run left in the queue: its batches are published anew."""
        if manifest is not None and manifest.job:
            self._client.forget(manifest.job)
            manifest.job = ""

    def _missing(self, manifest: Manifest, spec: VectorSpec) -> Iterator[TextBatch]:
        """Yield the batches that the output lacks, after checking those that it holds."""
        held = manifest.batches
        last = -1
        for piece in self._pieces(spec):
            last = piece.slice.index
            if last < held:
                if last == held - 1 and piece.digest != manifest.digest:
                    raise _changed(manifest)
                continue
            if self._progress.started is None:
                self._progress.started = time.monotonic()
            self._on_the_way[last] = piece
            yield piece.slice
        if last + 1 < held:
            raise _changed(manifest)

    def _require_unchanged(self, manifest: Manifest, spec: VectorSpec) -> None:
        rows, digest = 0, ""
        for piece in self._pieces(spec):
            rows, digest = rows + len(piece.slice), piece.digest
        if (rows, digest) != (manifest.rows, manifest.digest):
            raise InputChanged(
                f"{self._request.output} is complete, and the input has changed since: it has "
                f"{rows:,} documents now, {manifest.rows:,} then. Bring it up to date with "
                "--update, or start over with --restart."
            )

    def _pieces(self, spec: VectorSpec) -> Iterator[InputBatch]:
        documents = self._documents(self._progress)
        return iter_batches(documents, lambda texts: self._client.split(texts, spec))

    def _write(
        self, spool: PartialWriter, manifest: Manifest, piece: InputBatch, batch: BatchResult
    ) -> None:
        if batch.failure and batch.failure not in self._refusals:
            self._refusals.add(batch.failure)
            self._display.note(f"A batch was refused ({batch.failure[0]}): {batch.failure[1]}")
        spool.write(batch.vectors, list(item_lines(manifest.rows, piece, batch.outcomes)))
        outcomes, counts, progress = batch.outcomes, manifest.counts, self._progress
        for (status, device, _, _), n in outcomes.count_kinds():
            counts[status] += n
            if device and status == Status.OK:
                self._devices[device] += n
        for name, flag in _FLAGS:
            counts[name] += outcomes.count_flag(flag)
        tokens = int(outcomes.n_tokens.sum())
        manifest.rows += len(batch.slice)
        manifest.tokens += tokens
        manifest.batches, manifest.digest = batch.slice.index + 1, piece.digest
        progress.texts += len(batch.slice)
        progress.tokens += tokens
        progress.truncated, progress.failed = counts["truncated"], counts["failed"]

    def _checkpoint(self, manifest: Manifest, spool: PartialWriter) -> None:
        manifest.vectors_bytes, manifest.items_bytes = spool.sync()
        manifest.skipped = self._progress.reading.skipped
        manifest.save(self._path)

    def _summary(self, manifest: Manifest, written: list[Path]) -> RunSummary:
        now, started = time.monotonic(), self._progress.started
        working = now - started if started is not None else 0.0
        return RunSummary(
            total=manifest.rows,
            ok=manifest.counts["ok"],
            failed=manifest.counts["failed"],
            truncated=manifest.counts["truncated"],
            rerouted=manifest.counts["rerouted"],
            seconds=round(now - self._began, 3),
            startup_seconds=round((started or now) - self._began, 3),
            docs_per_second=round(self._progress.texts / working, 2) if working else 0.0,
            devices=dict(self._devices),
            resumed=self._progress.resumed,
            skipped_lines=manifest.skipped,
            outputs=[str(path) for path in written],
        )


def finish(output: Path, manifest: Manifest, dim: int) -> list[Path]:
    """Turn complete spools into the output, unless that is done; it may be killed and repeated.

    Returns:
        The files of the output.

    Raises:
        InputError: the output cannot be written, something cut the spools, or the output is missing
            although it was finished.
    """
    spool = PartialFiles(output)
    if manifest.complete:
        spool.remove()  # of an update that was killed before its manifest vouched for them
    else:
        spool.require_whole(manifest)
        manifest.embedded, manifest.job = True, ""
        manifest.save(manifest_path(output))
    written = writers.finalize(output, spool, manifest.rows, dim, manifest.dtype)
    if not manifest.complete:
        manifest.complete = True
        manifest.save(manifest_path(output))
    return written


def fresh_manifest(client: Client, request: EmbedRequest, spec: VectorSpec) -> Manifest:
    """Return the manifest of an output that nothing was done for yet."""
    settings = {
        key: str(value) if isinstance(value, str) else value
        for key, value in spec._asdict().items()
        if value or key != "quantized"  # manifests of an older embedq know no such word
    }
    settings["model_label"] = client.model_info().label
    settings["batch_texts"] = client.settings.batch_texts
    # A fleet that has changed must not change the split of what is half done.
    before = None if request.restart else Manifest.load(manifest_path(request.output))
    if before is not None and isinstance(kept := before.settings.get("batch_tokens"), int):
        client.keep_batch_tokens(kept)
    client.keep_batch_tokens(client.batch_tokens(spec))
    settings["batch_tokens"] = client.batch_tokens(spec)
    inputs = {
        "files": request.files(),
        "format": request.format,
        "id_field": request.fields.id,
        "text_field": request.fields.text,
        "bad_lines": "skip" if request.skip_bad_lines else "fail",
    }
    return Manifest(settings, inputs, client.engine() if request.pin_engine else {})


def item_lines(first_row: int, piece: InputBatch, outcomes: OutcomeTable) -> Iterator[str]:
    """Yield one line of JSON per document: row, id, outcome and the hash of its text."""
    parts = zip(piece.documents, outcomes.as_dicts(), piece.hashes, strict=True)
    for row, (document, outcome, digest) in enumerate(parts, first_row):
        yield json.dumps({"row": row, "id": document.id, **outcome, "text_hash": digest}) + "\n"


def _changed(manifest: Manifest) -> InputChanged:
    return InputChanged(
        f"The first {manifest.rows:,} documents of the input are not the ones that the output was "
        "made of. Give the same input, or start over with --restart."
    )
