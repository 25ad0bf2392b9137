"""Store compiled and quantized models on disk.

A compiled model is loaded only if no other user could have written it and everything it depends
on, the driver included, is unchanged; otherwise it is compiled again. A quantized model is written
by `embedq-worker quantize` only; its name is part of the spec of ``int8`` jobs, so vectors of two
quantized models never mix.
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

from embedq_worker.engines.base import Bytes
from embedq_worker.errors import CompileFailed, FailureReason
from embedq_worker.files import DigestCache, folder_error, locked
from embedq_worker.model.resolve import Model

log = logging.getLogger(__name__)

#: Version of the graphs that model/ builds. Raise it with every change there, so that models
#: compiled from an older graph are not used. Here, because a start from the cache loads no onnx.
GRAPH_VERSION: Final = 4

#: File names in the folder of a compiled model.
BLOB, META = "model.blob", "meta.json"

#: Prefix of folders that are being written.
_TEMPORARY: Final = "new-"

#: Age after which a temporary folder is removed, seconds.
ABANDONED_S: Final = 3600.0

#: Length of the name of a quantized model, characters.
NAME_LENGTH: Final = 16

#: Maximum size of a quantization report, bytes.
MAX_REPORT_BYTES: Final = 64 * 1024

#: First bytes of a quantized model.
_MAGIC: Final = b"EQI8"


@dataclass(frozen=True, slots=True)
class CacheKey:
    """Everything a compiled model depends on.

    Attributes:
        model: identity of the model.
        request: what was compiled: device, shapes, properties and graph version.
        environment: what compiled it: runtime, driver, compiler and architecture.
    """

    model: str
    request: Mapping[str, str]
    environment: Mapping[str, str]

    @property
    def folder(self) -> str:
        """Return the folder name: digests of request and environment."""
        return f"{_digest(self.request)}-{_digest(self.environment)}"

    def fields(self) -> dict[str, Any]:
        """Return the key for meta.json."""
        return {
            "model": self.model,
            "what": dict(sorted(self.request.items())),
            "versions": dict(sorted(self.environment.items())),
        }


class CompiledModelCache:
    """The compiled models of one model identity."""

    def __init__(self, cache_dir: Path, model: str) -> None:
        """Create the folder, or set ``error``; a worker serves without a cache too."""
        self._digests = DigestCache(cache_dir)
        self.folder = cache_dir / "compiled" / model[:16]
        #: Why the cache cannot be used; empty if it can.
        self.error = ""
        for folder in (cache_dir, cache_dir / "compiled", self.folder):
            self.error = self.error or _create_private(folder)
        if self.error:
            log.warning("cache_unusable reason=%s", self.error)

    def load(self, key: CacheKey) -> Bytes | None:
        """Return a compiled model, or None if there is no valid one."""
        folder = self.folder / key.folder
        if self.error or not folder.exists():
            return None
        try:
            return self._load(folder, key)
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("cache_entry_invalid folder=%s reason=%s", folder.name, error)
            return None

    def find(self, request: Mapping[str, str]) -> list[CacheKey]:
        """List the keys stored for a request in any environment, without checking the models."""
        found: list[CacheKey] = []
        for folder in sorted(self.folder.glob(f"{_digest(request)}-*")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                meta = json.loads((folder / META).read_text())
                key = CacheKey(str(meta["model"]), dict(meta["what"]), dict(meta["versions"]))
                if folder.name == key.folder:
                    found.append(key)
        return found

    def store(self, key: CacheKey, blob: Bytes) -> bool:
        """Store a compiled model and remove those of other environments for the same request.

        Returns:
            False if the cache cannot be written.
        """
        if self.error:
            return False
        target = self.folder / key.folder
        fresh = None
        try:
            self._sweep()
            fresh = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.folder))
            blob.tofile(fresh / BLOB)
            sha256 = hashlib.sha256(blob.data).hexdigest()
            meta = {**key.fields(), "bytes": blob.size, "sha256": sha256}
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
        # Processes that were killed while they wrote leave temporary folders.
        for left in self.folder.glob(f"{_TEMPORARY}*"):
            if time.time() - left.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)

    def discard(self, key: CacheKey) -> None:
        """Remove a compiled model if it exists."""
        shutil.rmtree(self.folder / key.folder, ignore_errors=True)

    @contextmanager
    def lock(self, key: CacheKey, timeout_s: float) -> Iterator[None]:
        """Hold the lock for compiling this key, so that workers that start together compile once.

        Raises:
            CompileFailed: another process held the lock for the whole timeout.
        """
        if self.error:
            yield
            return
        try:
            with locked(self.folder / f"{key.folder}.lock", timeout_s):
                yield
        except TimeoutError:
            raise CompileFailed(
                f"Another process has compiled the same model for over {timeout_s:.0f} s. "
                "Stop it, or raise EMBEDQ_COMPILE_TIMEOUT_S.",
                FailureReason.COMPILE_DEADLINE,
            ) from None

    def _load(self, folder: Path, key: CacheKey) -> Bytes:
        path = folder / BLOB
        for place in (folder, path, folder / META):
            found = place.lstat()
            if found.st_uid != os.geteuid() or found.st_mode & 0o022 or stat.S_ISLNK(found.st_mode):
                raise ValueError(f"{place.name} can be written by another user, or is a link")
        meta = json.loads((folder / META).read_text())
        if {name: meta[name] for name in key.fields()} != key.fields():
            raise ValueError("it was compiled for another key")
        if path.stat().st_size != meta["bytes"]:
            raise ValueError("it is truncated")
        if self._digests.of(path) != meta["sha256"]:
            raise ValueError("its checksum is wrong")
        return np.fromfile(path, np.uint8)


def _digest(fields: Mapping[str, str]) -> str:
    text = json.dumps(dict(fields), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _create_private(folder: Path) -> str:
    error = folder_error(folder)
    if not error and not os.access(folder, os.W_OK | os.X_OK):
        return f"{folder} cannot be written"
    return error


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """Comparison of a quantized model with fp32 on held-out texts.

    Attributes:
        calibration_texts, held_out_texts: number of texts.
        cosine_mean, cosine_min: cosine between both vectors of a text.
        overlap: share of the ten nearest neighbors that both models agree on; meaningless with
            fewer than eleven texts, because all others are neighbors then.
        changed: (line of the file, cosine, overlap) of the texts that changed most.
        method: quantization method with its version.
    """

    calibration_texts: int
    held_out_texts: int
    cosine_mean: float
    cosine_min: float
    overlap: float
    changed: tuple[tuple[int, float, float], ...] = ()
    method: str = ""

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> QuantizationReport:
        """Parse a report.

        Raises:
            TypeError, ValueError: the object is not a report.
        """
        known = {field.name: found[field.name] for field in fields(cls) if field.name in found}
        lines = tuple((int(n), float(c), float(o)) for n, c, o in known.pop("changed", ()))
        return cls(**known, changed=lines)

    def summary(self) -> str:
        """Return the report as one line of text."""
        return (
            f"cosine to fp32 mean {self.cosine_mean:.4f}, smallest {self.cosine_min:.4f}, "
            f"top-10 overlap {self.overlap:.3f} on {self.held_out_texts:,} held-out texts, "
            f"{self.calibration_texts:,} for calibration, {self.method}"
        )


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A quantized model.

    Attributes:
        name: identifies it among all quantized models of the same model.
        graph: graph for OpenVINO.
        report: comparison with fp32.
    """

    name: str
    graph: bytes
    report: QuantizationReport


class QuantizedModelStore:
    """The quantized model of one model in a worker's cache."""

    def __init__(self, cache_dir: Path, model: Model) -> None:
        self._model = model
        self._store = CompiledModelCache(cache_dir, model.identity)
        self._request = {"device": "cpu", "precision": "int8", "graph": str(GRAPH_VERSION)}
        self.folder = self._store.folder
        #: Why the cache cannot be used; empty if it can.
        self.error = self._store.error

    def current(self) -> str:
        """Return the name of the stored model without reading it; empty if there is none."""
        found = self._keys()
        return _name(found[-1]) if found else ""

    def load(self, name: str = "") -> QuantizedModel | None:
        """Load the stored model, or None if there is no valid one or it has another name."""
        wanted = name or self.current()
        key = next((key for key in self._keys() if _name(key) == wanted), None)
        raw = self._store.load(key) if key else None
        if key is None or raw is None:
            return None
        try:
            return _unpack(wanted, raw.tobytes())
        except (ValueError, TypeError, KeyError, struct.error) as error:
            log.warning("quantized_model_invalid folder=%s reason=%s", key.folder, error)
        return None

    def describe(self) -> str:
        """Return name and report of the stored model as one line; empty if there is none."""
        found = self.load()
        return f"{found.name}: {found.report.summary()}" if found else ""

    def store(self, calibration: str, graph: bytes, report: QuantizationReport) -> bool:
        """Replace the stored model.

        Args:
            calibration: calibration_digest of the texts and the method.
            graph: graph for OpenVINO.
            report: comparison with fp32.

        Returns:
            False if the cache cannot be written.
        """
        header = json.dumps(asdict(report)).encode()
        raw = b"".join((_MAGIC, struct.pack("<I", len(header)), header, graph))
        key = CacheKey(self._model.identity, self._request, {"calibration": calibration})
        return self._store.store(key, np.frombuffer(raw, np.uint8))

    def _keys(self) -> list[CacheKey]:
        # Newest last. There are several while one is replaced, or after files were copied here.
        found: list[tuple[int, str, CacheKey]] = []
        for key in self._store.find(self._request):
            with suppress(OSError):
                age = (self._store.folder / key.folder / BLOB).stat().st_mtime_ns
                found.append((age, key.folder, key))
        return [key for _, _, key in sorted(found) if key.model == self._model.identity]


def calibration_digest(texts: list[str], method: str) -> str:
    """Digest the calibration texts and the method, which identify a quantized model."""
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
        raise ValueError("it is not a quantized model")
    report = QuantizationReport.from_dict(json.loads(raw[start : start + size]))
    return QuantizedModel(name, raw[start + size :], report)
