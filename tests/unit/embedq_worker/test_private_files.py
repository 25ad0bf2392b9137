"""Tests of writing and reading files that only this user may change."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from embedq_worker.files import read_private, replace_private


def test_replaced_file_is_private_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    replace_private(path, b"one")
    path.with_name(f"file.{os.getpid()}.{threading.get_ident()}").write_bytes(b"stale")

    replace_private(path, b"two")

    assert read_private(path) == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (path / "content").mkdir(parents=True)

    with pytest.raises(OSError, match="directory"):
        replace_private(path, b"one")

    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "file")

    assert read_private(tmp_path / "link") is None
