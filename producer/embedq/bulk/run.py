"""Run of `embedq embed`: sends documents through a job and writes rows and items to disk.

The digest of a batch covers all documents up to its end, so one comparison shows whether the input
of a resumed run is the one that its output was made from.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
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

#: Hex characters of a text hash in the items. 64 bits avoid collisions between the versions of a
#: document in practice.
HASH_CHARACTERS = 16

#: Maximum time between two checkpoints, in seconds.
CHECKPOINT_EVERY_S = 5.0

#: Maximum number of batches between two checkpoints, as a share of the window.
CHECKPOINT_SHARE = 0.25

#: Replaces a refused text with a shared one that is refused for the same reason, to save memory.
_PLACEHOLDERS: dict[Code, object] = {
    Code.NOT_A_STRING: None,
    Code.TEXT_TOO_LARGE: "x" * (MAX_TEXT_BYTES + 1),
    Code.NUL_CHARACTER: "\0",
    Code.NOT_UNICODE: "\ud800",
}


@dataclass(frozen=True, slots=True)
class InputBatch:
    """A batch of texts with the documents that they come from.

    Attributes:
        text_batch: its texts.
        documents: the documents; a refused text is replaced by a placeholder.
        hashes: hash of each text; empty for a refused text.
        digest: hash over all documents up to the end of this batch.
    """

    text_batch: TextBatch
    documents: list[Document]
    hashes: list[str]
    digest: str


def iter_batches(
    documents: Iterable[Document], split: Callable[[Iterable[object]], Iterator[TextBatch]]
) -> Iterator[InputBatch]:
    """Yield batches of documents in order; `split` cuts texts into batches."""
    waiting: list[Document] = []

    def texts() -> Iterator[object]:
        for document in documents:
            code = refusal(document.text)
            if code is not Code.NONE:
                document = replace(document, text=_PLACEHOLDERS[code])
            waiting.append(document)
            yield document.text

    digest = ""
    for batch in split(texts()):
        n = len(batch)
        batch_documents, waiting[:n] = waiting[:n], []
        hashes = [
            "" if offset in batch.refused else text_hash(text)
            for offset, text in enumerate(batch.texts)
        ]
        state = hashlib.sha256(digest.encode())
        state.update(json.dumps([[document.id for document in batch_documents], hashes]).encode())
        digest = state.hexdigest()
        yield InputBatch(batch, batch_documents, hashes, digest)


def text_hash(text: str) -> str:
    """Return the hash that identifies a text in the items."""
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARACTERS]


class EmbedRun:
    """One run of the command, without --update."""

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
            client, request, display: see their classes.
            began: monotonic seconds at which the command started.
            documents: returns the documents to embed; by default all of the inputs.
        """
        self._client = client
        self._request = request
        self._display = display
        self._began = began
        self._documents = documents or request.documents
        self._path = manifest_path(request.output)
        self._progress = RunProgress()
        self._devices: Counter[str] = Counter()
        self._in_flight: dict[int, InputBatch] = {}
        self._shown_failures: set[tuple[str, str]] = set()

    def run(self) -> RunSummary:
        """Embed all documents whose rows are not on disk yet, and finish the output.

        Raises:
            InputError: an input cannot be read, or the output cannot be written.
            InputChanged: an input or a setting changed since the last run.
            QueueUnavailable, NoWorker, ResultError: see Client.encode.
        """
        output = self._request.output
        writers.require_writable(output)
        spec = self._request.spec(self._client)
        with lock_output(output):
            manifest = self._open_manifest(spec)
            if manifest.embedded:
                self._require_unchanged(manifest, spec)
                self._display.note(f"{output} is already complete; nothing to embed.")
            else:
                # First, because opening the partial files cuts them to the length in the manifest.
                manifest.save(self._path)
                with closing(PartialWriter(output, manifest)) as writer:
                    self._embed(manifest, spec, writer)
            return self._summary(manifest, finish(output, manifest, spec.dim))

    def _embed(self, manifest: Manifest, spec: VectorSpec, writer: PartialWriter) -> None:
        per_checkpoint = max(1, int(self._client.window() * CHECKPOINT_SHARE))
        job = self._client.job(
            self._remaining(manifest, spec),
            spec,
            label=self._request.output.name.encode(errors="replace").decode(),
            # Rows that are not on disk count as in flight, so that a kill costs at most one window.
            spare=per_checkpoint,
            refusable=False,
        )
        manifest.job = job.id
        manifest.save(self._path)
        unsaved, saved_at = 0, time.monotonic()
        for result in job.batches():
            batch = self._in_flight.pop(result.text_batch.index)
            self._write(writer, manifest, batch, result)
            unsaved += 1
            if unsaved >= per_checkpoint or time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                self._checkpoint(manifest, writer)
                unsaved, saved_at = 0, time.monotonic()
            self._display.update(self._progress)
        self._checkpoint(manifest, writer)

    def _open_manifest(self, spec: VectorSpec) -> Manifest:
        output = self._request.output
        fresh = fresh_manifest(self._client, self._request, spec)
        if self._request.restart:
            with suppress(InputError):  # a restart replaces a damaged manifest
                self._cancel_old_job(Manifest.load(self._path))
            return fresh
        found = Manifest.load(self._path)
        if found is not None:
            found.check_compatible(fresh)
            found.settings, found.inputs = fresh.settings, fresh.inputs
            self._cancel_old_job(found)
            self._progress.resumed = found.rows
            self._progress.truncated = found.counts["truncated"]
            self._progress.failed = found.counts["failed"]
            return found
        for path in filter(Path.exists, writers.files_of(output)):
            raise InputError(
                f"{path}: exists without a manifest, so it is not an unfinished output of this "
                "command. Name another output, or replace this one with --restart."
            )
        return fresh

    def _cancel_old_job(self, manifest: Manifest | None) -> None:
        # This run publishes the batches that a killed run left in the queue again.
        if manifest is not None and manifest.job:
            self._client.forget(manifest.job)
            manifest.job = ""

    def _remaining(self, manifest: Manifest, spec: VectorSpec) -> Iterator[TextBatch]:
        n_done = manifest.batches
        last = -1
        for batch in self._input_batches(spec):
            last = batch.text_batch.index
            if last < n_done:
                if last == n_done - 1 and batch.digest != manifest.digest:
                    raise _changed(manifest)
                continue
            if self._progress.started is None:
                self._progress.started = time.monotonic()
            self._in_flight[last] = batch
            yield batch.text_batch
        if last + 1 < n_done:
            raise _changed(manifest)

    def _require_unchanged(self, manifest: Manifest, spec: VectorSpec) -> None:
        rows, digest = 0, ""
        for batch in self._input_batches(spec):
            rows, digest = rows + len(batch.text_batch), batch.digest
        if (rows, digest) != (manifest.rows, manifest.digest):
            raise InputChanged(
                f"{self._request.output} is complete, but its input has changed: it has {rows:,} "
                f"documents now and had {manifest.rows:,}. Bring the output up to date with "
                "--update, or start over with --restart."
            )

    def _input_batches(self, spec: VectorSpec) -> Iterator[InputBatch]:
        documents = self._documents(self._progress)
        return iter_batches(documents, lambda texts: self._client.split(texts, spec))

    def _write(
        self, writer: PartialWriter, manifest: Manifest, batch: InputBatch, result: BatchResult
    ) -> None:
        if result.failure and result.failure not in self._shown_failures:
            self._shown_failures.add(result.failure)
            code, detail = result.failure
            self._display.note(f"A worker refused a batch ({code}): {detail}")
        outcomes, counts, progress = result.outcomes, manifest.counts, self._progress
        writer.write(result.vectors, _item_lines(manifest.rows, batch, outcomes))
        for (status, device, _, _), n in outcomes.count_kinds():
            counts[status] += n
            if device and status == Status.OK:
                self._devices[device] += n
        counts["truncated"] += outcomes.count_flag(TRUNCATED)
        counts["rerouted"] += outcomes.count_flag(REROUTED)
        rows, tokens = len(batch.text_batch), int(outcomes.n_tokens.sum())
        manifest.rows += rows
        manifest.tokens += tokens
        manifest.batches, manifest.digest = batch.text_batch.index + 1, batch.digest
        progress.texts += rows
        progress.tokens += tokens
        progress.truncated, progress.failed = counts["truncated"], counts["failed"]

    def _checkpoint(self, manifest: Manifest, writer: PartialWriter) -> None:
        manifest.vectors_bytes, manifest.items_bytes = writer.sync()
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
    """Turn complete partial files into the output if not done yet; safe to repeat after a kill.

    Returns:
        The files of the output.

    Raises:
        InputError: the output cannot be written, a partial file is too short, or a finished output
            is missing.
    """
    partial = PartialFiles(output)
    if manifest.complete:
        partial.remove()  # left by an update that was killed before it saved its manifest
    else:
        partial.check_lengths(manifest)
        manifest.embedded, manifest.job = True, ""
        manifest.save(manifest_path(output))
    written = writers.finalize(output, partial, manifest.rows, dim, manifest.dtype)
    if not manifest.complete:
        manifest.complete = True
        manifest.save(manifest_path(output))
    return written


def fresh_manifest(client: Client, request: EmbedRequest, spec: VectorSpec) -> Manifest:
    """Return the manifest of an output without rows."""
    settings = {
        key: str(value) if isinstance(value, str) else value
        for key, value in spec._asdict().items()
        if value or key != "quantized"  # manifests of older versions lack this key
    }
    settings["model_label"] = client.model_info().label
    settings["batch_texts"] = client.settings.batch_texts
    # The split of an unfinished output must not change with the fleet.
    before = None if request.restart else Manifest.load(manifest_path(request.output))
    if before is not None and isinstance(tokens := before.settings.get("batch_tokens"), int):
        client.set_batch_tokens(tokens)
    client.set_batch_tokens(client.batch_tokens(spec))
    settings["batch_tokens"] = client.batch_tokens(spec)
    inputs = {
        "files": request.files(),
        "format": request.format,
        "id_field": request.fields.id,
        "text_field": request.fields.text,
        "bad_lines": "skip" if request.skip_bad_lines else "fail",
    }
    return Manifest(settings, inputs, client.engine() if request.pin_engine else {})


def _item_lines(first_row: int, batch: InputBatch, outcomes: OutcomeTable) -> list[str]:
    parts = zip(batch.documents, outcomes.as_dicts(), batch.hashes, strict=True)
    return [
        json.dumps({"row": row, "id": document.id, **outcome, "text_hash": digest}) + "\n"
        for row, (document, outcome, digest) in enumerate(parts, first_row)
    ]


def _changed(manifest: Manifest) -> InputChanged:
    return InputChanged(
        f"The first {manifest.rows:,} documents of the input differ from those that the output was "
        "made from. Give the same input, or start over with --restart."
    )
