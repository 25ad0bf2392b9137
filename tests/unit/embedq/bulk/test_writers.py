"""Tests of turning partial files into an output of each format."""

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


def partial_files(output: Path, vectors: Vectors = VECTORS) -> PartialWriter:
    """Return complete partial files of an output."""
    writer = PartialWriter(output, Manifest(settings={}, inputs={}))
    writer.write(vectors, [json.dumps(item) + "\n" for item in ITEMS[: len(vectors)]])
    writer.sync()
    writer.close()
    return writer


def test_npy_output_has_a_sidecar_and_no_other_files(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"

    written = finalize(output, partial_files(output), 3, 3)

    assert written == [output, sidecar_path(output)]
    assert np.array_equal(np.load(output), VECTORS, equal_nan=True)
    assert [json.loads(line) for line in sidecar_path(output).read_text().splitlines()] == ITEMS
    assert sorted(tmp_path.iterdir()) == sorted(written)


def test_npy_output_without_rows_has_shape_0_by_dim(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"

    finalize(output, partial_files(output, VECTORS[:0]), 0, 3)

    assert np.load(output).shape == (0, 3)


def test_npy_output_can_be_memory_mapped(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    finalize(output, partial_files(output), 3, 3)

    mapped = np.load(output, mmap_mode="r")

    assert mapped[1].tolist() == [0, 0.5, 0.25]


def test_jsonl_output_has_null_as_vector_of_a_failed_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "CHUNK_ROWS", 2)
    output = tmp_path / "out.jsonl"

    finalize(output, partial_files(output), 3, 3)

    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line.pop("vector") for line in lines] == [[1, 0, 0], [0, 0.5, 0.25], None]
    assert lines == ITEMS
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is here")
def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
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
def test_unwritable_output_path_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()

    with pytest.raises(InputError, match=message):
        require_writable(tmp_path / name)


def test_read_only_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched, because root may write to every folder.
    monkeypatch.setattr("os.access", lambda *_: False)

    with pytest.raises(InputError, match="this folder is not writable"):
        require_writable(tmp_path / "out.npy")


def test_suffix_is_case_insensitive() -> None:
    assert format_of(Path("OUT.NPY")) == "npy"
