"""`embedq embed` as a whole: documents in, batches through a job, rows and items onto disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from embedq import outputs
from embedq.batching import Slice
from embedq.client import Client
from embedq.contract import Accuracy, OnLong, Status, VectorSpec
from embedq.errors import InputError
from embedq.files import Document, Fields, Reading, expand, read
from embedq.job import FinishedBatch
from embedq.ledger import Ledger
from embedq.outcomes import CACHED, REROUTED, TRUNCATED, OutcomeTable
from embedq.resume import Manifest, Spool, manifest_path

#: A checkpoint is due after this many seconds, or this share of the window of batches.
CHECKPOINT_EVERY_S, CHECKPOINT_SHARE = 5.0, 0.25
_FLAGS = (("truncated", TRUNCATED), ("cached", CACHED), ("rerouted", REROUTED))


@dataclass(frozen=True, slots=True)
class Request:
    """What the command was asked to do.

    Attributes:
        inputs, output: files; inputs may hold globs and ``-``.
        fields, format, skip_bad_lines: how the inputs are read.
        prompt_name, prompt, on_long, accuracy: as in Client.encode.
        restart: throw away what an earlier run left.
        pin_engine: refuse to go on with another engine than the one that began (a local run).
    """

    inputs: tuple[str, ...]
    output: Path
    fields: Fields = field(default_factory=Fields)
    format: str | None = None
    skip_bad_lines: bool = False
    prompt_name: str | None = None
    prompt: str | None = None
    on_long: OnLong | None = None
    accuracy: Accuracy | None = None
    restart: bool = False
    pin_engine: bool = False


@dataclass(slots=True)
class Progress:
    """How far a run is; shared with the display.

    Attributes:
        reading: position in the inputs.
        texts, tokens: embedded in this run.
        truncated, failed: in the whole output.
        resumed: texts that an earlier run had finished.
        started: monotonic seconds of the first publish, None before it.
    """

    reading: Reading = field(default_factory=Reading)
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    failed: int = 0
    resumed: int = 0
    started: float | None = None


@dataclass(slots=True)
class Summary:
    """What `--json` prints."""

    total: int
    ok: int
    failed: int
    cancelled: int
    truncated: int
    cached: int
    rerouted: int
    seconds: float
    startup_seconds: float
    docs_per_second: float
    devices: dict[str, int]
    resumed: int
    skipped_lines: int
    outputs: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Return the summary for JSON."""
        return asdict(self)


class Display(Protocol):
    """Shows a run to a person."""

    def update(self, progress: Progress) -> None:
        """Show how far the run is; called after each batch."""

    def note(self, message: str) -> None:
        """Show a sentence."""


@dataclass(slots=True)
class _Piece:
    """A batch on its way: the names and hashes of its documents, and the chain up to it."""

    slice: Slice
    ids: list[str | int]
    hashes: list[str]
    digest: str


class EmbedRun:
    """One run of the command."""

    def __init__(self, client: Client, request: Request, display: Display, began: float) -> None:
        """Prepare a run.

        Args:
            client: to publish with.
            request: what to do.
            display: shows progress.
            began: monotonic seconds at which the command began.
        """
        self._client = client
        self._request = request
        self._display = display
        self._began = began
        self._progress = Progress()
        self._devices: Counter[str] = Counter()
        self._pieces: dict[int, _Piece] = {}
        self._failures: set[tuple[str, str]] = set()

    def run(self) -> Summary:
        """Embed everything that the output does not hold yet.

        Raises:
            InputError: an input or the output cannot be used, or changed since the last run.
            QueueUnavailable, NoNode, ResultError: as Client.encode.
        """
        request = self._request
        inputs = expand(request.inputs)
        outputs.require_writable(request.output)
        spec = self._client.spec(
            prompt_name=request.prompt_name,
            prompt=request.prompt,
            on_long=request.on_long,
            accuracy=request.accuracy,
        )
        manifest = self._manifest(inputs, spec)
        if manifest.complete:
            return self._already_complete(inputs, manifest, spec)
        spool = Spool(request.output, manifest)
        try:
            self._embed(inputs, manifest, spec, spool)
        finally:
            spool.close()
        written = outputs.finish(request.output, spool, manifest.rows, spec.dim)
        manifest.complete, manifest.job = True, ""
        manifest.save(manifest_path(request.output))
        return self._summary(manifest, written)

    def _embed(self, inputs: list[str], manifest: Manifest, spec: VectorSpec, spool: Spool) -> None:
        window = self._client.settings.window
        per_checkpoint = max(1, int(window * CHECKPOINT_SHARE))
        job = self._client.job(
            self._new_slices(inputs, manifest, spec),
            spec,
            label=self._request.output.name,
            # What is not on disk yet counts as in flight, so that a kill costs one window at most.
            window=max(1, window - per_checkpoint),
        )
        manifest.job = job.id
        path = manifest_path(self._request.output)
        unsaved, saved_at = 0, time.monotonic()
        done: _Piece | None = None
        for batch in job.batches():
            done = self._pieces.pop(batch.slice.index)
            self._write(spool, manifest, done, batch)
            unsaved += 1
            if unsaved >= per_checkpoint or time.monotonic() - saved_at > CHECKPOINT_EVERY_S:
                self._checkpoint(manifest, spool, done, path)
                unsaved, saved_at = 0, time.monotonic()
            self._display.update(self._progress)
        if done is not None or not path.exists():
            self._checkpoint(manifest, spool, done, path)

    def _manifest(self, inputs: list[str], spec: VectorSpec) -> Manifest:
        """Return the manifest to go on from: the one beside the output, or a new one."""
        path = manifest_path(self._request.output)
        fresh = self._fresh_manifest(inputs, spec)
        found = None if self._request.restart else Manifest.load(path)
        if found is not None:
            found.refuse_change(fresh)
            self._forget_old_job(found)
            self._progress.resumed = found.rows
            self._progress.truncated = found.counts["truncated"]
            self._progress.failed = found.counts["failed"]
            return found
        if self._request.output.exists() and not self._request.restart:
            raise InputError(
                f"{self._request.output}: exists and has no manifest beside it, so it is not an "
                "unfinished output of this command. Name another, or replace it with --restart."
            )
        fresh.save(path)
        return fresh

    def _fresh_manifest(self, inputs: list[str], spec: VectorSpec) -> Manifest:
        settings = {key: _plain(value) for key, value in spec._asdict().items()}
        settings["model_label"] = self._client.card().label
        settings["batch_texts"] = self._client.settings.batch_texts
        settings["batch_tokens"] = self._client.settings.batch_tokens
        request = self._request
        how = {
            "files": inputs,
            "format": request.format,
            "id_field": request.fields.id,
            "text_field": request.fields.text,
            "bad_lines": "skip" if request.skip_bad_lines else "fail",
        }
        engine = self._client.engine() if request.pin_engine else {}
        return Manifest(settings=settings, inputs=how, engine=engine)

    def _forget_old_job(self, manifest: Manifest) -> None:
        """Drop what a killed run left in the queue: its batches are published anew."""
        if manifest.job:
            Ledger(self._client.redis, manifest.job).drop()
            manifest.job = ""

    def _new_slices(
        self, inputs: list[str], manifest: Manifest, spec: VectorSpec
    ) -> Iterator[Slice]:
        """Yield the batches that the output lacks, after checking those that it holds."""
        for piece in self._all_pieces(inputs, spec):
            if piece.slice.index < manifest.batches:
                if piece.slice.index == manifest.batches - 1:
                    self._require_same_input(piece, manifest)
                continue
            if self._progress.started is None:
                self._progress.started = time.monotonic()
            self._pieces[piece.slice.index] = piece
            yield piece.slice

    def _all_pieces(self, inputs: list[str], spec: VectorSpec) -> Iterator[_Piece]:
        names: list[str | int] = []

        def texts() -> Iterator[object]:
            for document in self._documents(inputs):
                names.append(document.id)
                yield document.text

        digest = ""
        for piece in self._client.split(texts(), spec):
            n = len(piece)
            ids, names[:n] = names[:n], []
            hashes = [
                hashlib.sha256(text.encode()).hexdigest()[:16]
                if offset not in piece.refused
                else ""
                for offset, text in enumerate(piece.texts)
            ]
            digest = _chain(digest, ids, hashes)
            yield _Piece(piece, ids, hashes, digest)

    def _documents(self, inputs: list[str]) -> Iterable[Document]:
        request = self._request
        return read(
            inputs,
            fields=request.fields,
            format=request.format,
            skip_bad_lines=request.skip_bad_lines,
            reading=self._progress.reading,
        )

    def _require_same_input(self, last: _Piece, manifest: Manifest) -> None:
        if last.digest != manifest.digest:
            raise InputError(
                f"The first {manifest.rows:,} documents of the input are not the ones that the "
                "output was made of. Start over with --restart, or bring the output up to date "
                "with --update."
            )

    def _already_complete(self, inputs: list[str], manifest: Manifest, spec: VectorSpec) -> Summary:
        last: _Piece | None = None
        rows = 0
        for last in self._all_pieces(inputs, spec):
            rows += len(last.slice)
        if rows != manifest.rows or (last is not None and last.digest != manifest.digest):
            raise InputError(
                f"{self._request.output} is complete, and the input has changed since: it has "
                f"{rows:,} documents now, {manifest.rows:,} then. Bring it up to date with "
                "--update, or start over with --restart."
            )
        self._display.note(f"{self._request.output} is complete already; nothing to embed.")
        written = [self._request.output]
        return self._summary(manifest, written)

    def _write(self, spool: Spool, manifest: Manifest, piece: _Piece, batch: FinishedBatch) -> None:
        if batch.failure and batch.failure not in self._failures:
            self._failures.add(batch.failure)
            self._display.note(f"A batch was refused ({batch.failure[0]}): {batch.failure[1]}")
        spool.write(batch.vectors, list(_items(manifest.rows, piece, batch.outcomes)))
        outcomes, counts = batch.outcomes, manifest.counts
        status = Counter(outcomes.kinds[kind][0] for kind in outcomes.kind.tolist())
        for name in Status:
            counts[name] += status[name]
        for flag_name, flag in _FLAGS:
            counts[flag_name] += outcomes.count_flag(flag)
        for kind in outcomes.kind.tolist():
            if outcomes.kinds[kind][1]:
                self._devices[outcomes.kinds[kind][1]] += 1
        manifest.rows += len(batch.slice)
        tokens = int(outcomes.n_tokens.sum())
        manifest.tokens += tokens
        progress = self._progress
        progress.texts += len(batch.slice)
        progress.tokens += tokens
        progress.truncated, progress.failed = counts["truncated"], counts["failed"]

    def _checkpoint(
        self, manifest: Manifest, spool: Spool, done: _Piece | None, path: Path
    ) -> None:
        manifest.vectors_bytes, manifest.items_bytes = spool.sync()
        if done is not None:
            manifest.batches, manifest.digest = done.slice.index + 1, done.digest
        manifest.skipped = self._progress.reading.skipped
        manifest.save(path)

    def _summary(self, manifest: Manifest, written: list[Path]) -> Summary:
        now = time.monotonic()
        started = self._progress.started
        working = now - started if started is not None else 0.0
        return Summary(
            total=manifest.rows,
            **{name: manifest.counts[name] for name in manifest.counts},
            seconds=round(now - self._began, 3),
            startup_seconds=round((started or now) - self._began, 3),
            docs_per_second=round(self._progress.texts / working, 2) if working else 0.0,
            devices=dict(self._devices),
            resumed=self._progress.resumed,
            skipped_lines=manifest.skipped,
            outputs=[str(path) for path in written],
        )


def _items(first_row: int, piece: _Piece, outcomes: OutcomeTable) -> Iterator[str]:
    """Yield one line of JSON per document."""
    for offset, (name, digest) in enumerate(zip(piece.ids, piece.hashes, strict=True)):
        outcome = asdict(outcomes[offset])
        yield json.dumps({"row": first_row + offset, "id": name, **outcome, "text": digest}) + "\n"


def _chain(before: str, ids: list[str | int], hashes: list[str]) -> str:
    """Extend the chain over all documents so far by one batch."""
    state = hashlib.sha256(before.encode())
    state.update(json.dumps([ids, hashes]).encode())
    return state.hexdigest()


def _plain(value: object) -> object:
    return str(value) if isinstance(value, str) else value
