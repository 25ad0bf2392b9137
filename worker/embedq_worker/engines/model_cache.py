"""Compiled blobs and quantized models on disk.

Compiled models on the disk, each in a folder that carries all it depends on.

OpenVINO's own cache does not know the driver, so the name is ours. A
blob is used only if this user alone could have written it and nothing about it has changed; any
other is compiled again. Losing the folder costs a compile, nothing else.

The quantized copy of a model: one file in the cache, with the report of its quality inside.

It is made by `embedq-worker quantize` and by nothing else. One copy of a model is kept; its name is
part of what a job of class ``int8`` asks for, so that vectors of two copies never mix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import stat
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_worker.errors import CompileFailed, FailureReason
from embedq_worker.files import DigestCache, folder_error, locked
from embedq_worker.model.resolve import Model

log = logging.getLogger(__name__)


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
class CacheKey:
    """What a compiled model depends on.

    Attributes:
        model: identity of the model.
        what: device, shape, properties and graph: what was asked for.
        versions: runtime, driver, compiler and architecture: what answered.
    """

    model: str
    request: Mapping[str, str]
    environment: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Name the folder: what was asked for, then what answered."""
        return f"{_digest(self.request)}-{_digest(self.environment)}"

    def fields(self) -> dict[str, Any]:
        """Return everything in clear."""
        return {
            "model": self.model,
            "what": dict(sorted(self.request.items())),
            "versions": dict(sorted(self.environment.items())),
        }


class CompiledModelCache:
    """The compiled models of one model identity."""

    def __init__(self, cache_dir: Path, model: str) -> None:
        """Make the folder, or note why there is none: serving does not need it."""
        self._digests = DigestCache(cache_dir)
        self.folder = cache_dir / "compiled" / model[:16]
        #: Why nothing is kept; empty if all is well.
        self.error = ""
        for folder in (cache_dir, cache_dir / "compiled", self.folder):
            self.error = self.error or _make_private(folder)
        if self.error:
            log.warning("cache_unusable reason=%s", self.error)

    def load(self, key: CacheKey) -> Bytes | None:
        """Return a compiled model, or None if there is none to be trusted."""
        folder = self.folder / key.folder
        if self.error or not folder.exists():
            return None
        try:
            return self._load(folder, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("cache_entry_invalid folder=%s reason=%s", folder.name, error)
            return None

    def find(self, what: Mapping[str, str]) -> list[CacheKey]:
        """Return what is kept for the same, by whatever versions; none of it is checked yet."""
        found: list[CacheKey] = []
        for folder in sorted(self.folder.glob(f"{_digest(what)}-*")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                meta = json.loads((folder / META).read_text())
                key = CacheKey(str(meta["model"]), dict(meta["what"]), dict(meta["versions"]))
                if folder.name == key.folder:
                    found.append(key)
        return found

    def store(self, key: CacheKey, blob: Bytes) -> bool:
        """Keep a compiled model and drop those for the same by another runtime or driver."""
        if self.error:
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
            log.warning("cache_write_failed reason=%s", error.strerror or error)
            return False
        for other in self.folder.glob(f"{_digest(key.request)}-*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)
        return True

    def _sweep(self) -> None:
        """Remove what processes left that were killed while they wrote."""
        for left in self.folder.glob(f"{_BEGUN}*"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)

    def discard(self, key: CacheKey) -> None:
        """Remove a compiled model; a missing one is fine."""
        shutil.rmtree(self.folder / key.folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: CacheKey, deadline_s: float) -> Iterator[None]:
        """Hold the right to compile this: workers that start together compile once.

        Raises:
            CompileFailed: another process holds it past the deadline.
        """
        if self.error:
            yield
            return
        try:
            with locked(self.folder / f"{key.folder}.lock", deadline_s):
                yield
        except TimeoutError:
            raise CompileFailed(
                f"Another process compiles the same model and took over {deadline_s:.0f} s.",
                FailureReason.COMPILE_DEADLINE,
            ) from None

    def _load(self, folder: Path, key: CacheKey) -> Bytes:
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


#: Characters of the name of a copy.
NAME_LENGTH: Final = 16


#: Most bytes of a report.
MAX_REPORT_BYTES: Final = 64 * 1024


_MAGIC: Final = b"EQI8"


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """How a quantized model compares with fp32 on texts that it was not calibrated with.

    Attributes:
        calibration_texts, held_out_texts: how many there were.
        cosine_mean, cosine_min: between the vectors of a text.
        overlap: share of the ten nearest neighbors that stay among them; with fewer than eleven
            texts, of all others, and then it says nothing.
        changed: (line of the file, cosine, overlap) of the texts that changed most.
        method: what quantized it, with its version.
    """

    calibration_texts: int
    held_out_texts: int
    cosine_mean: float
    cosine_min: float
    overlap: float
    changed: tuple[tuple[int, float, float], ...] = ()
    method: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> QuantizationReport:
        """Read a report; raises TypeError or ValueError for what is none."""
        known = {key: found[key] for key in (f.name for f in fields(cls)) if key in found}
        lines = tuple((int(n), float(c), float(o)) for n, c, o in known.pop("changed", ()))
        return cls(**known, changed=lines)

    def summary(self) -> str:
        """Say it in a line."""
        return (
            f"cosine to fp32 mean {self.cosine_mean:.4f}, smallest {self.cosine_min:.4f}, "
            f"top-10 overlap {self.overlap:.3f} on {self.held_out_texts:,} held-out texts, "
            f"{self.calibration_texts:,} for calibration, {self.method}"
        )


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A quantized copy.

    Attributes:
        name: tells it from every other copy of the same model.
        graph: for OpenVINO.
        quality: its report.
    """

    name: str
    graph: bytes
    report: QuantizationReport


class QuantizedModelStore:
    """The quantized copy of one model in a worker's cache."""

    def __init__(self, cache_dir: Path, model: Model) -> None:
        self._model = model
        self._store = CompiledModelCache(cache_dir, model.identity)
        self._what = {"device": "cpu", "precision": "int8", "graph": str(GRAPH_VERSION)}

    @property
    def error(self) -> str:
        """Why nothing can be kept; empty if all is well."""
        return self._store.error

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self._store.folder

    def current(self) -> str:
        """Name the copy that is kept, without reading it; empty for none."""
        found = self._keys()
        return _name(found[-1]) if found else ""

    def load(self, name: str = "") -> QuantizedModel | None:
        """Read the copy, if this is its name or none is given; None for none to be trusted."""
        wanted = name or self.current()
        key = next((key for key in self._keys() if _name(key) == wanted), None)
        raw = self._store.load(key) if key else None
        if key is None or raw is None:
            return None
        try:
            return _unpack(wanted, raw.tobytes())
        except (ValueError, TypeError, KeyError, struct.error) as error:
            log.warning("quantized_refused folder=%s reason=%s", key.folder, error)
        return None

    def describe(self) -> str:
        """Say what is kept and how good it is, in a line; empty for nothing."""
        found = self.load()
        return f"{found.name}: {found.report.summary()}" if found else ""

    def keep(self, calibration: str, graph: bytes, quality: QuantizationReport) -> bool:
        """Put a copy in the place of the one before; False if the cache cannot be written.

        Args:
            calibration: names everything that it was made of and by.
            graph: for OpenVINO.
            quality: its report.
        """
        report = json.dumps(quality.as_dict()).encode()
        raw = b"".join((_MAGIC, struct.pack("<I", len(report)), report, graph))
        return self._store.store(self._key(calibration), np.frombuffer(raw, np.uint8))

    def _key(self, calibration: str) -> CacheKey:
        return CacheKey(self._model.identity, self._what, {"calibration": calibration})

    def _keys(self) -> list[CacheKey]:
        """Return what is kept, the newest last: several while one is replaced, or copied here."""
        found: list[tuple[int, str, CacheKey]] = []
        for key in self._store.find(self._what):
            with suppress(OSError):
                age = (self._store.folder / key.folder / BLOB).stat().st_mtime_ns
                found.append((age, key.folder, key))
        return [key for _, _, key in sorted(found) if key.model == self._model.identity]


def calibration_digest(texts: list[str], method: str) -> str:
    """Name what a copy is made of and by."""
    state = hashlib.sha256(method.encode())
    for text in texts:
        raw = text.encode()
        state.update(struct.pack("<I", len(raw)))
        state.update(raw)
    return state.hexdigest()


def _name(key: CacheKey) -> str:
    return key.environment["calibration"][:NAME_LENGTH]


def _unpack(name: str, raw: bytes) -> QuantizedModel:
    start = len(_MAGIC) + 4
    size = struct.unpack_from("<I", raw, len(_MAGIC))[0]
    if not raw.startswith(_MAGIC) or size > min(MAX_REPORT_BYTES, len(raw) - start):
        raise ValueError("it is not a quantized model of ours")
    quality = QuantizationReport.from_dict(json.loads(raw[start : start + size]))
    return QuantizedModel(name, raw[start + size :], quality)
