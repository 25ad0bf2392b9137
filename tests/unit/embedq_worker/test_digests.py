"""A digest is remembered only while nothing about the file, or the memory, is doubtful."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache


def test_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    """A digest is computed once for a path, size, time and inode, and again after a change."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digests = DigestCache(tmp_path / "cache")
    first = digests.of(path)
    memory = tmp_path / "cache" / "digests.json"
    known = json.loads(memory.read_text())
    known[str(path)][-1] = "remembered"
    memory.write_text(json.dumps(known))

    assert digests.of(path) == "remembered"
    path.write_bytes(b"three")
    assert digests.of(path) not in ("remembered", first)
    assert memory.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["not json", "[]", '{"PATH": 7}', '{"PATH": []}', ""])
def test_damaged_memory_of_digests_is_ignored(tmp_path: Path, damage: str) -> None:
    """Whatever the memory holds, the digest is right."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    right = DigestCache(tmp_path / "cache").of(path)
    memory = tmp_path / "cache" / "digests.json"
    memory.write_text(damage.replace("PATH", str(path)))

    assert DigestCache(tmp_path / "cache").of(path) == right


def test_memory_that_others_may_write_is_ignored(tmp_path: Path) -> None:
    """A memory with group or world write permission could have been forged."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    right = DigestCache(tmp_path / "cache").of(path)
    memory = tmp_path / "cache" / "digests.json"
    memory.write_text(memory.read_text().replace(right, "f" * 64))
    memory.chmod(0o666)

    assert DigestCache(tmp_path / "cache").of(path) == right


def test_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    """A cache folder that is a file is no reason to fail."""
    path = tmp_path / "file"
    path.write_bytes(b"one")
    (tmp_path / "cache").write_text("a file")

    assert len(DigestCache(tmp_path / "cache").of(path)) == 64


def test_unreadable_file_is_a_model_error(tmp_path: Path) -> None:
    """A file that is gone is a ModelError with its path."""
    with pytest.raises(ModelError, match=r"gone cannot be read"):
        DigestCache(tmp_path).of(tmp_path / "gone")
