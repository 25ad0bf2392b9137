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
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from embedq.errors import ContractError, InputError, writing
from embedq.jobs.batches import Document, Embedding
from embedq.jobs.job import Job
from embedq.protocol.contract import VectorSpec

#: Version of the checkpoint file.
CHECKPOINT_VERSION: Final = 1

#: One document: a text, an (id, text) pair or a Document.
AnyDocument = str | tuple[str | int, str] | Document


class Stream:
    """An iterator of `Embedding`; read it once, in one thread."""

    def __init__(
        self,
        prepare: Callable[[Iterable[object]], Job],
        spec: VectorSpec,
        documents: Iterable[AnyDocument],
        *,
        ordered: bool,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        """Prepare a stream; documents are pulled as fast as the window allows.

        Args:
            prepare: prepares the job that embeds the texts.
            spec: spec of the job.
            documents: texts, (id, text) pairs or Documents.
            ordered: return results in the order of the documents, not as they complete.
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
        self._fingerprint = spec.fingerprint().hex()
        self._done = hashlib.sha256()
        self._n_done = 0
        #: Position in the job -> id and digest of a document in flight.
        self._in_flight: dict[int, tuple[str | int, bytes]] = {}
        self._documents = (_document(at, document) for at, document in enumerate(documents))
        self.resumed = self._skip_committed()
        self._job = prepare(self._iter_texts())
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
        name, digest = self._in_flight.pop(int(result.id))
        self._done.update(digest)
        self._n_done += 1
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
            "fingerprint": self._fingerprint,
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
            self._in_flight[position] = document.id, _digest(document)
            yield document.text

    def _skip_committed(self) -> int:
        if self._path is None or not self._path.exists():
            return 0
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            committed = range(body["documents"])
            digest, fingerprint = body["digest"], body["fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._path}: is not a readable checkpoint. Delete it to start over."
            ) from error
        if fingerprint != self._fingerprint:
            raise InputError(
                f"{self._path}: was written with another model or other settings. Use them again, "
                "or delete the file to start over."
            )
        for _, document in zip(committed, self._documents, strict=False):
            self._done.update(_digest(document))
            self._n_done += 1
        if self._done.hexdigest() != digest:
            raise InputError(
                f"{self._path}: the first {len(committed):,} documents differ from the committed "
                "ones. Pass the same documents in the same order, or delete the file to start over."
            )
        return self._n_done


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
