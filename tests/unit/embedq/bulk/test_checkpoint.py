"""Tests of the manifest, the partial files and the lock of an output."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedq.bulk.checkpoint import (
    MANIFEST_VERSION,
    Manifest,
    PartialWriter,
    lock_output,
    manifest_path,
    npy_header,
)
from embedq.errors import InputError, writing

MANIFEST = Manifest(
    settings={"model": "ab", "prompt": ""}, inputs={"files": ["a.txt"]}, rows=5, batches=2
)


def save_manifest(folder: Path, **changes: object) -> Path:
    """Save a manifest with some fields changed and return its path."""
    path = folder / "m.json"
    MANIFEST.save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_manifest_survives_save_and_load(tmp_path: Path) -> None:
    path = manifest_path(tmp_path / "out.npy")
    MANIFEST.save(path)

    assert Manifest.load(path) == MANIFEST
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npy.embedq.json"]


def test_missing_manifest_loads_as_none(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path / "none.json") is None


def test_unknown_field_of_the_manifest_is_ignored(tmp_path: Path) -> None:
    assert Manifest.load(save_manifest(tmp_path, color="blue")) == MANIFEST


def test_newer_manifest_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"manifest version 2; .* up to 1\. Upgrade embedq, or"):
        Manifest.load(save_manifest(tmp_path, version=MANIFEST_VERSION + 1))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": 1}', '{"version": "one"}'])
def test_damaged_manifest_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)

    with pytest.raises(InputError, match="--restart"):
        Manifest.load(path)


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (replace(MANIFEST, settings={"model": "ab", "prompt": "q"}), 'setting prompt = ""'),
        (replace(MANIFEST, settings={"model": "ab"}), "now it is nothing"),
        (replace(MANIFEST, inputs={"files": ["b.txt"]}), r'input files = \["a.txt"\]'),
    ],
)
def test_changed_request_is_refused_with_both_values(now: Manifest, words: str) -> None:
    with pytest.raises(InputError, match=f"{words}.*--restart"):
        MANIFEST.check_compatible(now)


def test_equal_request_is_compatible_whatever_its_progress() -> None:
    MANIFEST.check_compatible(replace(MANIFEST, rows=0, batches=0, job="other"))


def test_partial_file_is_truncated_to_the_last_checkpoint(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    first = PartialWriter(output, replace(MANIFEST, batches=0))
    first.write(np.ones((2, 3), np.float32), ["a\n", "b\n"])
    vectors_bytes, items_bytes = first.sync()
    first.write(np.zeros((9, 3), np.float32), ["lost\n"] * 9)
    first.close()

    safe = replace(MANIFEST, vectors_bytes=vectors_bytes, items_bytes=items_bytes)
    again = PartialWriter(output, safe)
    again.write(np.full((1, 3), 2, np.float32), ["c\n"])
    again.close()

    rows = np.frombuffer(again.vectors_path.read_bytes()[128:], "<f4").reshape(-1, 3)
    assert rows[:, 0].tolist() == [1, 1, 2]
    assert again.items_path.read_text() == "a\nb\nc\n"


def test_partial_file_shorter_than_its_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shorter than its manifest says"):
        PartialWriter(tmp_path / "out.npy", replace(MANIFEST, vectors_bytes=1000))


def test_locked_output_is_refused_until_it_is_released(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"

    with (
        lock_output(output),
        pytest.raises(InputError, match="another embedq is writing this output"),
        lock_output(output),
    ):
        pytest.fail("claimed twice")
    with lock_output(output):
        pass

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "dim"), [(0, 1), (1, 384), (10**9, 65_536)])
def test_npy_header_is_readable_by_numpy_and_of_fixed_size(
    rows: int, dim: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(npy_header(rows, dim))

    with path.open("rb") as raw:
        assert np.lib.format.read_magic(raw) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(raw)

    assert len(npy_header(rows, dim)) == 128
    assert (shape, fortran, dtype) == ((rows, dim), False, np.dtype("<f4"))


def test_full_disk_is_reported_with_the_next_step(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")

    with (
        pytest.raises(InputError, match=r"the disk is full.*run the same command again"),
        writing(full),
        full.open("wb", buffering=0) as out,
    ):
        out.write(b"x")


def test_system_error_of_a_write_is_reported_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written \(Is a dir"), writing(tmp_path):
        os.open(tmp_path, os.O_WRONLY)
