"""Tests of the cache of compiled models and of the checks before a blob is used."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedq_worker.engines.model_cache import BLOB, META, CacheKey, CompiledModelCache
from embedq_worker.errors import CompileFailed, FailureReason

MODEL = "ab" * 32
KEY = CacheKey(MODEL, {"device": "NPU", "shapes": "[1, 256]"}, {"openvino": "1", "driver": "7"})
CONTENT = np.arange(5000, dtype=np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> CompiledModelCache:
    return CompiledModelCache(tmp_path / "cache", MODEL)


def test_stored_blob_is_loaded_from_a_private_folder(store: CompiledModelCache) -> None:
    assert store.load(KEY) is None

    assert store.store(KEY, CONTENT)

    found = store.load(KEY)
    assert found is not None and found.tobytes() == CONTENT.tobytes()
    folder = store.folder / KEY.folder
    assert [path.stat().st_mode & 0o777 for path in (store.folder, folder)] == [0o700, 0o700]
    assert json.loads((folder / META).read_text())["versions"] == {"openvino": "1", "driver": "7"}


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, environment={**KEY.environment, "driver": "8"}),
        replace(KEY, environment={**KEY.environment, "openvino": "2"}),
        replace(KEY, request={**KEY.request, "shapes": "[1, 512]"}),
        replace(KEY, request={**KEY.request, "graph": "2"}),
    ],
)
def test_blob_of_another_version_or_shape_is_not_found(
    store: CompiledModelCache, other: CacheKey
) -> None:
    store.store(KEY, CONTENT)

    assert store.load(other) is None


def test_new_blob_replaces_blobs_of_other_versions_only(store: CompiledModelCache) -> None:
    wide = replace(KEY, request={**KEY.request, "shapes": "[1, 512]"})
    updated = replace(KEY, environment={**KEY.environment, "driver": "8"})
    store.store(KEY, CONTENT)
    store.store(wide, CONTENT)

    store.store(updated, CONTENT)

    assert store.load(KEY) is None
    assert store.load(wide) is not None
    assert store.load(updated) is not None


def test_old_unfinished_blob_is_removed_and_a_recent_one_is_not(store: CompiledModelCache) -> None:
    stale, recent = store.folder / "new-a", store.folder / "new-b"
    for folder in (stale, recent):
        folder.mkdir()
        (folder / BLOB).write_bytes(CONTENT.tobytes())
    os.utime(stale, (1e9, 1e9))

    store.store(KEY, CONTENT)

    assert {path.name for path in store.folder.iterdir()} == {KEY.folder, "new-b"}


def truncate(folder: Path) -> None:
    os.truncate(folder / BLOB, 100)


def flip_byte(folder: Path) -> None:
    with (folder / BLOB).open("r+b") as file:
        file.seek(17)
        file.write(b"\xff")


def make_world_writable(folder: Path) -> None:
    (folder / BLOB).chmod(0o666)


def replace_by_link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    (folder / BLOB).rename(elsewhere)
    (folder / BLOB).symlink_to(elsewhere)


def damage_description(folder: Path) -> None:
    (folder / META).write_text("{")


def change_driver_version(folder: Path) -> None:
    """Make the description name another driver version."""
    meta = json.loads((folder / META).read_text())
    meta["versions"]["driver"] = "6"
    (folder / META).write_text(json.dumps(meta))


def remove_blob(folder: Path) -> None:
    (folder / BLOB).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_byte,
        make_world_writable,
        replace_by_link,
        damage_description,
        change_driver_version,
        remove_blob,
    ],
)
def test_untrusted_blob_is_reported_and_replaced(
    store: CompiledModelCache, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    store.store(KEY, CONTENT)
    assert store.load(KEY) is not None
    damage(store.folder / KEY.folder)

    assert store.load(KEY) is None
    assert "cache_entry_invalid" in caplog.text
    assert store.store(KEY, CONTENT)
    assert store.load(KEY) is not None


def test_cache_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    CompiledModelCache(tmp_path / "cache", MODEL).store(KEY, CONTENT)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)

    store = CompiledModelCache(tmp_path / "cache", MODEL)

    assert "not a folder of this user" in store.error
    assert store.load(KEY) is None
    assert not store.store(KEY, CONTENT)
    assert "cache_unusable" in caplog.text


def test_world_writable_cache_folder_is_not_used(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    (cache / "compiled").mkdir(parents=True)
    (cache / "compiled").chmod(0o777)

    assert "chmod 700" in CompiledModelCache(cache, MODEL).error


def test_unusable_cache_folder_is_reported_without_an_exception(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")

    store = CompiledModelCache(tmp_path / "cache", MODEL)

    assert store.error
    with store.lock(KEY, 1.0):
        assert not store.store(KEY, CONTENT)


def test_full_disk_leaves_no_partial_blob(
    store: CompiledModelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)

    assert not store.store(KEY, CONTENT)

    assert "cache_write_failed reason=No space left" in caplog.text
    assert list(store.folder.iterdir()) == []


def test_lock_blocks_a_second_caller(store: CompiledModelCache) -> None:
    order: list[str] = []
    locked, release = threading.Event(), threading.Event()

    def first() -> None:
        with store.lock(KEY, 5.0):
            locked.set()
            release.wait(5)
            order.append("first")

    holder = threading.Thread(target=first)
    holder.start()
    locked.wait(5)
    threading.Timer(0.1, release.set).start()
    with store.lock(KEY, 5.0):
        order.append("second")
    holder.join()

    assert order == ["first", "second"]


def test_wait_for_a_lock_ends_at_its_deadline(store: CompiledModelCache) -> None:
    with (
        store.lock(KEY, 1.0),
        pytest.raises(CompileFailed) as caught,
        store.lock(KEY, 0.1),
    ):
        pass

    assert caught.value.reason is FailureReason.COMPILE_DEADLINE
