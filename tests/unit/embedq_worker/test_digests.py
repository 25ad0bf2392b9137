"""Tests of the cache of file digests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache


def test_digest_is_cached_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    digests = DigestCache(tmp_path / "cache")
    first = digests.of(path)
    cache_file = tmp_path / "cache" / "digests.json"
    cached = json.loads(cache_file.read_text())
    cached[str(path)][-1] = "from the cache"
    cache_file.write_text(json.dumps(cached))

    assert digests.of(path) == "from the cache"
    path.write_bytes(b"three")
    assert digests.of(path) not in ("from the cache", first)
    assert cache_file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["not json", "[]", '{"PATH": 7}', '{"PATH": []}', ""])
def test_damaged_cache_is_ignored(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    right = DigestCache(tmp_path / "cache").of(path)
    cache_file = tmp_path / "cache" / "digests.json"
    cache_file.write_text(damage.replace("PATH", str(path)))

    assert DigestCache(tmp_path / "cache").of(path) == right


def test_cache_writable_by_others_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    right = DigestCache(tmp_path / "cache").of(path)
    cache_file = tmp_path / "cache" / "digests.json"
    cache_file.write_text(cache_file.read_text().replace(right, "f" * 64))
    cache_file.chmod(0o666)

    assert DigestCache(tmp_path / "cache").of(path) == right


def test_unusable_cache_folder_does_not_prevent_hashing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"one")
    (tmp_path / "cache").write_text("a file")

    assert len(DigestCache(tmp_path / "cache").of(path)) == 64


def test_unreadable_file_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone cannot be read"):
        DigestCache(tmp_path).of(tmp_path / "gone")
