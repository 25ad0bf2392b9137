"""Any iterable of documents in, vectors out one by one, with points to go on from.

stream = client.stream(documents, checkpoint="index.embedq.json")
for embedded in stream:
    sink.add(embedded.id, embedded.vector)
    if full(sink):
        sink.flush()
        stream.commit()      # everything handed out so far is safe in the sink
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


#: What a stream takes: a text, an (id, text) pair, or a Document.
AnyDocument = str | tuple[str | int, str] | Document


class Opener(Protocol):
    """What a stream needs of its client."""

    def split(self, texts: Iterable[object], spec: VectorSpec) -> Iterator[TextBatch]:
        """Cut texts into batches."""

    def job(
        self, slices: Iterable[TextBatch], spec: VectorSpec, *, ordered: bool, strict: bool | None
    ) -> Job:
        """Prepare a job."""


@dataclass(frozen=True, slots=True)
class _Point:
    """A point to go on from: how many documents are safe, and a digest of exactly those."""

    documents: int
    digest: str
    fingerprint: str


class Stream:
    """An iterator of `Embedded`; read it in one thread, once."""

    def __init__(
        self,
        opener: Opener,
        spec: VectorSpec,
        documents: Iterable[AnyDocument],
        *,
        ordered: bool,
        checkpoint: str | os.PathLike[str] | None,
        strict: bool | None = None,
    ) -> None:
        """Prepare a stream; documents are pulled only as fast as the window allows.

        Args:
            opener: the client.
            spec: what shapes the vectors.
            documents: texts, (id, text) pairs or Documents.
            ordered: in the order of the documents, or as they complete.
            strict: take vectors from an NPU or not at all; None as the client's settings say.
            checkpoint: file that `commit` writes; if it exists, the documents that it vouches for
                are read and checked, and not embedded again.

        Raises:
            InputError: the checkpoint is damaged, was made with other settings, or asks for an
                order that is not kept.
        """
        if checkpoint is not None and not ordered:
            raise InputError(
                "A checkpoint counts documents in order; use ordered=True with checkpoint."
            )
        self._path = Path(checkpoint) if checkpoint is not None else None
        self._spec = spec
        self._done = hashlib.sha256()
        self._n_done = 0
        self._names: deque[tuple[str | int, bytes]] = deque()
        self._by_position: dict[int, tuple[str | int, bytes]] = {}
        self._ordered = ordered
        self._documents = (_document(at, document) for at, document in enumerate(documents))
        self.resumed = self._skip(self._load())
        texts = self._remember()
        self._job = opener.job(opener.split(texts, spec), spec, ordered=ordered, strict=strict)
        self._results = self._job.results()

    def __iter__(self) -> Iterator[Embedding]:
        return self

    def __next__(self) -> Embedding:
        try:
            result = next(self._results)
        except StopIteration:
            raise
        except BaseException:  # Ctrl-C, too
            self._results = self._job.results()  # who asks again is told that it has ended
            raise
        if self._ordered:
            name, digest = self._names.popleft()
            self._done.update(digest)
            self._n_done += 1
        else:
            name, _ = self._by_position.pop(int(result.id))
        return Embedding(name, result.vector, result.outcome)

    def commit(self) -> None:
        """Note that everything handed out so far is safe in the caller's sink.

        A program that is started again with the same checkpoint goes on behind this point.

        Raises:
            InputError: there is no checkpoint, or it cannot be written.
        """
        if self._path is None:
            raise InputError("commit() needs a file: client.stream(..., checkpoint='PATH').")
        point = {
            "version": CHECKPOINT_VERSION,
            "documents": self._n_done,
            "digest": self._done.hexdigest(),
            "fingerprint": self._spec.fingerprint().hex(),
        }
        temporary = self._path.with_name(self._path.name + ".tmp")
        with writing(self._path), temporary.open("w", encoding="utf-8") as out:
            json.dump(point, out)
            out.flush()
            os.fsync(out.fileno())
            temporary.replace(self._path)

    def close(self) -> None:
        """Cancel what is still on its way."""
        self._job.cancel()

    def _remember(self) -> Iterator[object]:
        """Hand on the texts and keep the names of those on their way; bounded by the window."""
        for position, document in enumerate(self._documents):
            known = (document.id, _digest(document))
            if self._ordered:
                self._names.append(known)
            else:
                self._by_position[position] = known
            yield document.text

    def _load(self) -> _Point | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            point = _Point(body["documents"], body["digest"], body["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._path}: not a checkpoint that can be read. Delete it to start over."
            ) from error
        if point.fingerprint != self._spec.fingerprint().hex():
            raise InputError(
                f"{self._path}: was made with another model or other settings. Use those, or "
                "delete it to start over."
            )
        return point

    def _skip(self, point: _Point | None) -> int:
        if point is None:
            return 0
        for _ in range(point.documents):
            document = next(self._documents, None)
            if document is None:
                break
            self._done.update(_digest(document))
            self._n_done += 1
        if self._done.hexdigest() != point.digest:
            raise InputError(
                f"{self._path}: the first {point.documents:,} documents are not those that were "
                "committed. Give the same documents in the same order, or delete it to start over."
            )
        return point.documents


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
