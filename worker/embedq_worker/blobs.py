"""Compiled models on the disk, each in a folder that carries all it depends on.

OpenVINO's own cache does not know the driver, so the name is ours. A
blob is used only if this user alone could have written it and nothing about it has changed; any
other is compiled again. Losing the folder costs a compile, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_worker.digests import Digests
from embedq_worker.errors import CompileFailed, Reason
from embedq_worker.file_lock import locked
from embedq_worker.private_files import folder_error

log = logging.getLogger("embedq.worker")

Bytes = npt.NDArray[np.uint8]
#: Raised whenever graph.GRAPH_VERSION is; not imported from there, because that imports onnx, which
#: a start with a compiled model does without. A test compares the two.
GRAPH_VERSION: Final = 1
#: Names inside a blob's folder.
BLOB, META = "model.blob", "meta.json"
#: How the name of a folder begins that is being written; seconds after which its writer is gone.
_BEGUN: Final = "new-"
ABANDONED_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class BlobKey:
    """What a compiled model depends on.

    Attributes:
        model: identity of the model.
        what: device, shape, properties and graph: what was asked for.
        versions: runtime, driver, compiler and architecture: what answered.
    """

    model: str
    what: Mapping[str, str]
    versions: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Name the folder: what was asked for, then what answered."""
        return f"{_digest(self.what)}-{_digest(self.versions)}"

    def fields(self) -> dict[str, Any]:
        """Return everything in clear."""
        return {
            "model": self.model,
            "what": dict(sorted(self.what.items())),
            "versions": dict(sorted(self.versions.items())),
        }


class BlobStore:
    """The compiled models of one model identity."""

    def __init__(self, cache_dir: Path, model: str) -> None:
        """Make the folder, or note why there is none: serving does not need it."""
        self._digests = Digests(cache_dir)
        self.folder = cache_dir / "compiled" / model[:16]
        #: Why nothing is kept; empty if all is well.
        self.trouble = ""
        for folder in (cache_dir, cache_dir / "compiled", self.folder):
            self.trouble = self.trouble or _make_private(folder)
        if self.trouble:
            log.warning("cache_unusable reason=%s", self.trouble)

    def load(self, key: BlobKey) -> Bytes | None:
        """Return a compiled model, or None if there is none to be trusted."""
        folder = self.folder / key.folder
        if self.trouble or not folder.exists():
            return None
        try:
            return self._load(folder, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("blob_refused folder=%s reason=%s", folder.name, error)
            return None

    def find(self, what: Mapping[str, str]) -> list[BlobKey]:
        """Return what is kept for the same, by whatever versions; none of it is checked yet."""
        found: list[BlobKey] = []
        for folder in sorted(self.folder.glob(f"{_digest(what)}-*")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                meta = json.loads((folder / META).read_text())
                key = BlobKey(str(meta["model"]), dict(meta["what"]), dict(meta["versions"]))
                if folder.name == key.folder:
                    found.append(key)
        return found

    def store(self, key: BlobKey, blob: Bytes) -> bool:
        """Keep a compiled model and drop those for the same by another runtime or driver."""
        if self.trouble:
            return False
        target = self.folder / key.folder
        fresh = None
        try:
            self._sweep()
            fresh = Path(tempfile.mkdtemp(prefix=_BEGUN, dir=self.folder))
            blob.tofile(fresh / BLOB)
            meta = {
                **key.fields(),
                "bytes": blob.size,
                "sha256": hashlib.sha256(blob.data).hexdigest(),
            }
            (fresh / META).write_text(json.dumps(meta, indent=1))
            self.discard(key)
            fresh.rename(target)
        except OSError as error:
            if fresh:
                shutil.rmtree(fresh, ignore_errors=True)
            log.warning("blob_not_kept reason=%s", error.strerror or error)
            return False
        for other in self.folder.glob(f"{_digest(key.what)}-*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        return True

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they wrote."""
        for left in self.folder.glob(f"{_BEGUN}*"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)

    def discard(self, key: BlobKey) -> None:
        """Remove a compiled model; a missing one is fine."""
        shutil.rmtree(self.folder / key.folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: BlobKey, deadline_s: float) -> Iterator[None]:
        """Hold the right to compile this: nodes that start together compile once.

        Raises:
            CompileFailed: another process holds it past the deadline.
        """
        if self.trouble:
            yield
            return
        try:
            with locked(self.folder / f"{key.folder}.lock", deadline_s):
                yield
        except TimeoutError:
            raise CompileFailed(
                f"Another process compiles the same model and took over {deadline_s:.0f} s.",
                Reason.COMPILE_DEADLINE,
            ) from None

    def _load(self, folder: Path, key: BlobKey) -> Bytes:
        path = folder / BLOB
        for place in (folder, path, folder / META):
            found = place.lstat()
            if found.st_uid != os.geteuid() or found.st_mode & 0o022 or stat.S_ISLNK(found.st_mode):
                raise ValueError(f"{place.name} is not this user's alone")
        meta = json.loads((folder / META).read_text())
        if {name: meta[name] for name in key.fields()} != key.fields():
            raise ValueError("it was made for something else")
        if path.stat().st_size != meta["bytes"]:
            raise ValueError("it is truncated")
        if self._digests.of(path) != meta["sha256"]:
            raise ValueError("its bytes have changed")
        return np.fromfile(path, np.uint8)


def _digest(fields: Mapping[str, str]) -> str:
    text = json.dumps(dict(fields), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _make_private(folder: Path) -> str:
    """Make a folder of our own, and say what is wrong with it; empty if nothing is."""
    error = folder_error(folder)
    if not error and not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    return error
