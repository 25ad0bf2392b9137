"""The quantised copy of a model: one file in the cache, with the report of its quality inside.

It is made by `embedq-worker quantize` and by nothing else. One copy of a model is kept; its name is
part of what a job of class ``int8`` asks for, so that vectors of two copies never mix.
"""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np

from embedq_worker.blobs import BLOB, GRAPH_VERSION, BlobKey, BlobStore
from embedq_worker.models import Model

log = logging.getLogger("embedq.worker")

#: Characters of the name of a copy.
NAME_LENGTH: Final = 16
#: Most bytes of a report.
MAX_REPORT_BYTES: Final = 64 * 1024

_MAGIC: Final = b"EQI8"


@dataclass(frozen=True, slots=True)
class Quality:
    """How a quantised model compares with fp32 on texts that it was not calibrated with.

    Attributes:
        calibration_texts, held_out_texts: how many there were.
        cosine_mean, cosine_min: between the vectors of a text.
        overlap: share of the ten nearest neighbours that stay among them; with fewer than eleven
            texts, of all others, and then it says nothing.
        changed: (line of the file, cosine, overlap) of the texts that changed most.
        method: what quantised it, with its version.
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
    def from_dict(cls, found: Mapping[str, Any]) -> Quality:
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
class Quantised:
    """A quantised copy.

    Attributes:
        name: tells it from every other copy of the same model.
        graph: for OpenVINO.
        quality: its report.
    """

    name: str
    graph: bytes
    quality: Quality


class QuantisedStore:
    """The quantised copy of one model in a node's cache."""

    def __init__(self, cache_dir: Path, model: Model) -> None:
        self._model = model
        self._store = BlobStore(cache_dir, model.identity)
        self._what = {"device": "cpu", "precision": "int8", "graph": str(GRAPH_VERSION)}

    @property
    def trouble(self) -> str:
        """Why nothing can be kept; empty if all is well."""
        return self._store.trouble

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self._store.folder

    def current(self) -> str:
        """Name the copy that is kept, without reading it; empty for none."""
        found = self._keys()
        return _name(found[-1]) if found else ""

    def load(self, name: str = "") -> Quantised | None:
        """Read the copy, if this is its name or none is given; None for none to be trusted."""
        wanted = name or self.current()
        key = next((key for key in self._keys() if _name(key) == wanted), None)
        raw = self._store.load(key) if key else None
        if key is None or raw is None:
            return None
        try:
            return _unpack(wanted, raw.tobytes())
        except (ValueError, TypeError, KeyError, struct.error) as error:
            log.warning("quantised_refused folder=%s reason=%s", key.folder, error)
        return None

    def describe(self) -> str:
        """Say what is kept and how good it is, in a line; empty for nothing."""
        found = self.load()
        return f"{found.name}: {found.quality.summary()}" if found else ""

    def keep(self, calibration: str, graph: bytes, quality: Quality) -> bool:
        """Put a copy in the place of the one before; False if the cache cannot be written.

        Args:
            calibration: names everything that it was made of and by.
            graph: for OpenVINO.
            quality: its report.
        """
        report = json.dumps(quality.as_dict()).encode()
        raw = b"".join((_MAGIC, struct.pack("<I", len(report)), report, graph))
        return self._store.store(self._key(calibration), np.frombuffer(raw, np.uint8))

    def _key(self, calibration: str) -> BlobKey:
        return BlobKey(self._model.identity, self._what, {"calibration": calibration})

    def _keys(self) -> list[BlobKey]:
        """Return what is kept, the newest last: several while one is replaced, or copied here."""
        found: list[tuple[int, str, BlobKey]] = []
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


def _name(key: BlobKey) -> str:
    return key.versions["calibration"][:NAME_LENGTH]


def _unpack(name: str, raw: bytes) -> Quantised:
    start = len(_MAGIC) + 4
    size = struct.unpack_from("<I", raw, len(_MAGIC))[0]
    if not raw.startswith(_MAGIC) or size > min(MAX_REPORT_BYTES, len(raw) - start):
        raise ValueError("it is not a quantised model of ours")
    quality = Quality.from_dict(json.loads(raw[start : start + size]))
    return Quantised(name, raw[start + size :], quality)
