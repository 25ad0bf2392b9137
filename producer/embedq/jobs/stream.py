"""Embeds any iterable of documents, one result at a time, with checkpoints.

stream = client.stream(documents, checkpoint="index.embedq.json")
for embedded in stream:
    sink.add(embedded.id, embedded.vector)
    if full(sink):
        sink.flush()
        stream.commit()      # all results up to here are safe in the sink
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from embedq.errors import ContractError, InputError, writing
from embedq.jobs.batches import Document, Embedding, TextBatch
from embedq.jobs.job import Job
from embedq.protocol.contract import VectorSpec

#: Version of the checkpoint file.
CHECKPOINT_VERSION: Final = 1


#: One document: a text, an (id, text) pair or a Document.
AnyDocument = str | tuple[str | int, str] | Document


class JobFactory(Protocol):
    """The methods of a client that a stream calls."""

    def split(self, texts: Iterable[object], spec: VectorSpec) -> Iterator[TextBatch]:
        """Split texts into batches."""

    def job(
        self, slices: Iterable[TextBatch], spec: VectorSpec, *, ordered: bool, strict: bool | None
    ) -> Job:
        """Prepare a job."""


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    documents: int
    digest: str
    fingerprint: str


class Stream:
    """An iterator of `Embedding`; read it once, in one thread."""

    def __init__(
        self,
        client: JobFactory,
        spec: VectorSpec,
        documents: Iterable[AnyDocument],
        *,
        ordered: bool,
        checkpoint: str | os.PathLike[str] | None,
        strict: bool | None = None,
    ) -> None:
        """Prepare a stream; documents are pulled as fast as the window allows.

        Args:
            client: the client.
            spec: spec of the job.
            documents: texts, (id, text) pairs or Documents.
            ordered: return results in the order of the documents, not as they complete.
            strict: vectors from an NPU only; None uses the client's setting.
            checkpoint: file that `commit` writes; if it exists, its documents are read and
                compared, and not embedded again.

        Raises:
            InputError: the checkpoint is damaged, belongs to other settings or documents, or is
                combined with ordered=False.
        """
        if checkpoint is not None and not ordered:
            raise InputError(
                "A checkpoint counts documents in order; use ordered=True with checkpoint."
            )
        self._path = Path(checkpoint) if checkpoint is not None else None
        self._spec = spec
        self._done = hashlib.sha256()
        self._n_done = 0
        self._in_flight: deque[tuple[str | int, bytes]] = deque()
        self._by_position: dict[int, tuple[str | int, bytes]] = {}
        self._ordered = ordered
        self._documents = (_document(at, document) for at, document in enumerate(documents))
        self.resumed = self._skip(self._load())
        texts = self._iter_texts()
        self._job = client.job(client.split(texts, spec), spec, ordered=ordered, strict=strict)
        self._results = self._job.results()

    def __iter__(self) -> Iterator[Embedding]:
        return self

    def __next__(self) -> Embedding:
        try:
            result = next(self._results)
        except StopIteration:
            raise
        except BaseException:  # includes Ctrl-C
            self._results = self._job.results()  # the next call raises ResultExpired
            raise
        if self._ordered:
            name, digest = self._in_flight.popleft()
            self._done.update(digest)
            self._n_done += 1
        else:
            name, _ = self._by_position.pop(int(result.id))
        return Embedding(name, result.vector, result.outcome)

    def commit(self) -> None:
        """Write to the checkpoint that all results so far are safe in the caller's sink.

        A program that is started again with this checkpoint continues after them.

        Raises:
            InputError: the stream has no checkpoint, or the file cannot be written.
        """
        if self._path is None:
            raise InputError("commit() needs a file: client.stream(..., checkpoint='PATH').")
        checkpoint = {
            "version": CHECKPOINT_VERSION,
            "documents": self._n_done,
            "digest": self._done.hexdigest(),
            "fingerprint": self._spec.fingerprint().hex(),
        }
        temporary = self._path.with_name(self._path.name + ".tmp")
        with writing(self._path), temporary.open("w", encoding="utf-8") as out:
            json.dump(checkpoint, out)
            out.flush()
            os.fsync(out.fileno())
            temporary.replace(self._path)

    def close(self) -> None:
        """Cancel the job."""
        self._job.cancel()

    def _iter_texts(self) -> Iterator[object]:
        # Stores the ids of the documents in flight, so it is bounded by the window.
        for position, document in enumerate(self._documents):
            entry = (document.id, _digest(document))
            if self._ordered:
                self._in_flight.append(entry)
            else:
                self._by_position[position] = entry
            yield document.text

    def _load(self) -> _Checkpoint | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            checkpoint = _Checkpoint(body["documents"], body["digest"], body["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._path}: is not a readable checkpoint. Delete it to start over."
            ) from error
        if checkpoint.fingerprint != self._spec.fingerprint().hex():
            raise InputError(
                f"{self._path}: was written with another model or other settings. Use them again, "
                "or delete the file to "
                "start over."
            )
        return checkpoint

    def _skip(self, checkpoint: _Checkpoint | None) -> int:
        if checkpoint is None:
            return 0
        for _ in range(checkpoint.documents):
            document = next(self._documents, None)
            if document is None:
                break
            self._done.update(_digest(document))
            self._n_done += 1
        if self._done.hexdigest() != checkpoint.digest:
            raise InputError(
                f"{self._path}: the first {checkpoint.documents:,} documents differ from the "
                "committed ones. Pass the same documents in the same order, or delete the file to "
                "start over."
            )
        return checkpoint.documents


def _document(position: int, document: AnyDocument) -> Document:
    if isinstance(document, tuple):
        document = Document(*document)
    elif not isinstance(document, Document):
        document = Document(position, document)
    if not isinstance(document.id, str | int):
        kind = type(document.id).__name__
        raise ContractError(
            f"Document {position:,} has an id of type {kind}; ids are str or int. Use str(id)."
        )
    return document


def _digest(document: Document) -> bytes:
    text = document.text
    raw = text.encode(errors="surrogatepass") if isinstance(text, str) else repr(text).encode()
    return hashlib.sha256(json.dumps(document.id).encode() + b"\0" + raw).digest()
