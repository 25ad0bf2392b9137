"""Spools become the output: rows and items in step, every format, in one rename."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from embedq.bulk import writers
from embedq.bulk.checkpoint import Manifest, PartialWriter
from embedq.bulk.writers import finalize, format_of, require_writable, sidecar_path
from embedq.errors import InputError
from embedq.protocol.values import Vectors

VECTORS = np.array([[1, 0, 0], [0, 0.5, 0.25], [np.nan] * 3], np.float32)
ITEMS = [
    {"row": 0, "id": "a", "status": "ok"},
    {"row": 1, "id": 7, "status": "ok"},
    {"row": 2, "id": "ü", "status": "failed"},
]


def spooled(output: Path, vectors: Vectors = VECTORS) -> PartialWriter:
    """Return complete spools of an output."""
    spool = PartialWriter(output, Manifest(settings={}, inputs={}))
    spool.write(vectors, [json.dumps(item) + "\n" for item in ITEMS[: len(vectors)]])
    spool.sync()
    spool.close()
    return spool


def test_npy_has_its_sidecar_and_nothing_else(tmp_path: Path) -> None:
    """Rows and items are files of their own, in the same order; spools are gone."""
    output = tmp_path / "out.npy"

    written = finalize(output, spooled(output), 3, 3)

    assert written == [output, sidecar_path(output)]
    assert np.array_equal(np.load(output), VECTORS, equal_nan=True)
    assert [json.loads(line) for line in sidecar_path(output).read_text().splitlines()] == ITEMS
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_npy_without_rows_is_an_empty_array(tmp_path: Path) -> None:
    """An input without texts gives [0, D]."""
    output = tmp_path / "out.npy"

    finalize(output, spooled(output, VECTORS[:0]), 0, 3)

    assert np.load(output).shape == (0, 3)


def test_npy_can_be_mapped(tmp_path: Path) -> None:
    """The rows are aligned, so that a large output need not be read to be used."""
    output = tmp_path / "out.npy"
    finalize(output, spooled(output), 3, 3)

    mapped = np.load(output, mmap_mode="r")

    assert mapped[1].tolist() == [0, 0.5, 0.25]


def test_jsonl_has_vectors_in_its_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is an item with its vector; a failed one has none, so that no NaN is in JSON."""
    monkeypatch.setattr(writers, "CHUNK_ROWS", 2)
    output = tmp_path / "out.jsonl"

    finalize(output, spooled(output), 3, 3)

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line.pop("vector") for line in lines] == [[1, 0, 0], [0, 0.5, 0.25], None]
    assert lines == ITEMS
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is here")
def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    """The missing extra is told before any work."""
    with pytest.raises(InputError, match=r"pip install 'embedq\[parquet\]'"):
        require_writable(tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.npz", r"unknown ending npz; expected one of npy, jsonl, parquet. Did you mean npy\?"),
        ("out", r"unknown ending \(none\)"),
        ("folder.npy", "is a folder. Name a file in it"),
        ("missing/out.npy", "no such folder. Create it: mkdir -p"),
        (f"{'x' * 240}.npy", "its name has 244 bytes; the limit is 228"),
        (f"{'x' * 300}.npy", "its name has 304 bytes; the limit is 228"),
    ],
)
def test_output_that_cannot_be_written_is_told_before_any_work(
    name: str, message: str, tmp_path: Path
) -> None:
    """Each is one sentence with the name and the next step."""
    (tmp_path / "folder.npy").mkdir()

    with pytest.raises(InputError, match=message):
        require_writable(tmp_path / name)


def test_folder_without_permission_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder is named; root may write everywhere, so the answer is asked for here."""
    monkeypatch.setattr("os.access", lambda *_: False)

    with pytest.raises(InputError, match="this folder cannot be written to"):
        require_writable(tmp_path / "out.npy")


def test_ending_decides_whatever_its_case() -> None:
    """OUT.NPY is an npy."""
    assert format_of(Path("OUT.NPY")) == "npy"
