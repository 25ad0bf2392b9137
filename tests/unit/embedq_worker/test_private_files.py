"""A private file is replaced in one step, and read only if nobody else could have written it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from embedq_worker.files import read_private, replace_private


def test_replaced_file_is_private_and_alone(tmp_path: Path) -> None:
    """What a killed process of the same id left does not stop a write, and nothing else stays."""
    path = tmp_path / "new" / "file"
    replace_private(path, b"one")
    path.with_name(f"file.{os.getpid()}.{threading.get_ident()}").write_bytes(b"left")

    replace_private(path, b"two")

    assert read_private(path, 100) == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """A target that cannot be replaced raises, and the new file is removed."""
    path = tmp_path / "file"
    (path / "content").mkdir(parents=True)

    with pytest.raises(OSError, match="directory"):
        replace_private(path, b"one")

    assert list(tmp_path.iterdir()) == [path]


def test_link_is_not_read(tmp_path: Path) -> None:
    """A link may point at what somebody else prepared."""
    (tmp_path / "file").write_bytes(b"one")
    (tmp_path / "link").symlink_to(tmp_path / "file")

    assert read_private(tmp_path / "link", 100) is None
