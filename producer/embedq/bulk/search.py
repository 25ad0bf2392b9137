"""`embedq search`: finds the rows of an .npy output that are nearest to a query.

It scans all rows; it inspects results and does not replace a vector database.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from embedq.bulk.checkpoint import Manifest, manifest_path
from embedq.bulk.writers import format_of, sidecar_path
from embedq.errors import InputError
from embedq.protocol.values import Vectors

#: Number of rows compared at a time.
CHUNK_ROWS: Final = 65_536


class Hit(NamedTuple):
    """One of the nearest rows.

    Attributes:
        row: index in the output.
        id: id of the document.
        score: cosine similarity to the query.
    """

    row: int
    id: str | int
    score: float


def load_manifest(vectors: Path) -> Manifest:
    """Read the manifest of a finished npy output.

    Raises:
        InputError: the output has another format, is unfinished, or lacks its manifest.
    """
    if format_of(vectors) != "npy":
        raise InputError(f"{vectors}: search reads .npy outputs only. Name one, or embed into one.")
    manifest = Manifest.load(manifest_path(vectors))
    if manifest is not None and not manifest.complete:
        raise InputError(f"{vectors}: is not finished. Run its `embedq embed` command again.")
    if manifest is None or not vectors.exists():
        raise InputError(
            f"{vectors}: not an output of `embedq embed`; the file and its manifest "
            f"{manifest_path(vectors).name} must both exist. Run `embedq embed` first."
        )
    return manifest


def nearest_rows(vectors: Path, query: Vectors, k: int) -> list[Hit]:
    """Return the k rows nearest to a query, best first, without failed rows.

    Args:
        vectors: path of a finished npy output, float32 or float16 [n, D].
        query: vector, float32 [D].
        k: maximum number of rows.

    Raises:
        InputError: the output or its items file is damaged.
    """
    try:
        rows: Vectors = np.load(vectors, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise _damaged(vectors) from error
    unit = query.astype(np.float32) / max(float(np.linalg.norm(query)), 1e-12)
    best: list[tuple[float, int]] = []
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = np.asarray(rows[start : start + CHUNK_ROWS], np.float32)
        lengths = np.linalg.norm(chunk, axis=1)
        scores = np.nan_to_num((chunk @ unit) / np.maximum(lengths, 1e-12), nan=-2.0)
        top = np.argsort(-scores, kind="stable")[:k]
        best += [(float(scores[at]), start + int(at)) for at in top if scores[at] >= -1.01]
        best = sorted(best, key=lambda hit: (-hit[0], hit[1]))[:k]
    names = _ids(sidecar_path(vectors), {row for _, row in best})
    if len(names) < len(best):
        raise _damaged(sidecar_path(vectors))
    return [Hit(row, names[row], score) for score, row in best]


def _damaged(path: Path) -> InputError:
    return InputError(
        f"{path}: lacks the format that embedq writes. Restore it, or embed with --restart."
    )


def _ids(sidecar: Path, wanted: set[int]) -> dict[int, str | int]:
    try:
        with sidecar.open(encoding="utf-8") as lines:
            return {row: json.loads(line)["id"] for row, line in enumerate(lines) if row in wanted}
    except OSError as error:
        raise InputError(f"{sidecar}: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(sidecar) from error
