"""What the golden texts should give: computed once in fp32 by onnxruntime, then kept.

The file lies beside the compiled models of the same model, so that a node whose engine is proven
needs neither onnxruntime nor the graph for its next start.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_worker.golden import GOLDEN
from embedq_worker.models import Model
from embedq_worker.private_files import read_private, replace_private

log = logging.getLogger("embedq.worker")

Vectors = npt.NDArray[np.float32]
#: Bytes of the checksum that a file begins with.
DIGEST_BYTES: Final = 32
#: Most bytes of a file; a larger one is not ours.
MAX_BYTES: Final = 1024 * 1024


def load_or_make(model: Model, cache_dir: Path, make: Callable[[], Vectors]) -> Vectors:
    """Return the vectors of the golden texts, float32 [n, D].

    Args:
        model: whose vectors.
        cache_dir: where they are kept.
        make: computes them; asked only where none are kept, or none that are to be trusted.

    Raises:
        EngineError: they cannot be computed.
    """
    path = cache_dir / "compiled" / model.identity[:16] / _name()
    kept = _load(path, (len(GOLDEN), model.dim))
    if kept is not None:
        return kept
    vectors = make()
    _keep(path, vectors)
    return vectors


def _name() -> str:
    """Name everything that shapes them, beside the model."""
    asked = hashlib.sha256("\0".join(GOLDEN).encode()).hexdigest()[:12]
    return f"reference-{asked}-onnxruntime-{version('onnxruntime')}"


def _load(path: Path, shape: tuple[int, int]) -> Vectors | None:
    found = read_private(path, MAX_BYTES)
    if found is None:
        return None
    digest, body = found[:DIGEST_BYTES], found[DIGEST_BYTES:]
    if hashlib.sha256(body).digest() != digest:
        log.warning("reference_refused path=%s", path)
        return None
    vectors: Vectors = np.load(io.BytesIO(body), allow_pickle=False)
    return vectors if vectors.shape == shape and vectors.dtype == np.float32 else None


def _keep(path: Path, vectors: Vectors) -> None:
    """Replace the file; a cache that cannot be written costs the next start a second."""
    buffer = io.BytesIO()
    np.save(buffer, vectors, allow_pickle=False)
    body = buffer.getvalue()
    try:
        replace_private(path, hashlib.sha256(body).digest() + body)
    except OSError as error:
        log.debug("reference_not_kept path=%s reason=%s", path, error.strerror)
