"""A compiled model is used only if nothing about it has changed and nobody else could write it."""

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
    """An empty store."""
    return CompiledModelCache(tmp_path / "cache", MODEL)


def test_stored_blob_comes_back(store: CompiledModelCache) -> None:
    """The same bytes, from a folder that only this user may enter."""
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
def test_blob_of_another_driver_or_shape_is_not_found(
    store: CompiledModelCache, other: CacheKey
) -> None:
    """Whatever a compiled model depends on is part of its name."""
    store.store(KEY, CONTENT)

    assert store.load(other) is None


def test_blob_of_an_older_driver_goes_when_a_new_one_comes(store: CompiledModelCache) -> None:
    """The same question with other versions is stale; other questions stay."""
    wide = replace(KEY, request={**KEY.request, "shapes": "[1, 512]"})
    updated = replace(KEY, environment={**KEY.environment, "driver": "8"})
    store.store(KEY, CONTENT)
    store.store(wide, CONTENT)

    store.store(updated, CONTENT)

    assert store.load(KEY) is None
    assert store.load(wide) is not None
    assert store.load(updated) is not None


def test_half_written_blob_of_a_killed_process_goes_in_the_end(store: CompiledModelCache) -> None:
    """Each is as large as a model; one that somebody writes just now is left alone."""
    abandoned, begun = store.folder / "new-a", store.folder / "new-b"
    for folder in (abandoned, begun):
        folder.mkdir()
        (folder / BLOB).write_bytes(CONTENT.tobytes())
    os.utime(abandoned, (1e9, 1e9))

    store.store(KEY, CONTENT)

    assert {path.name for path in store.folder.iterdir()} == {KEY.folder, "new-b"}


def truncate(folder: Path) -> None:
    """Cut the blob short."""
    os.truncate(folder / BLOB, 100)


def flip(folder: Path) -> None:
    """Change a byte, and nothing else."""
    with (folder / BLOB).open("r+b") as file:
        file.seek(17)
        file.write(b"\xff")


def open_up(folder: Path) -> None:
    """Let everybody write the blob."""
    (folder / BLOB).chmod(0o666)


def link(folder: Path) -> None:
    """Put a link in the place of the blob."""
    elsewhere = folder.parent / "elsewhere"
    (folder / BLOB).rename(elsewhere)
    (folder / BLOB).symlink_to(elsewhere)


def scribble(folder: Path) -> None:
    """Make the description unreadable."""
    (folder / META).write_text("{")


def rename(folder: Path) -> None:
    """Pass a blob off as one for another driver."""
    meta = json.loads((folder / META).read_text())
    meta["versions"]["driver"] = "6"
    (folder / META).write_text(json.dumps(meta))


def empty(folder: Path) -> None:
    """Lose the blob, as after a crash of the machine."""
    (folder / BLOB).unlink()


@pytest.mark.parametrize("damage", [truncate, flip, open_up, link, scribble, rename, empty])
def test_damaged_or_foreign_blob_is_refused(
    store: CompiledModelCache, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """It is named in the log, and a new one takes its place."""
    store.store(KEY, CONTENT)
    assert store.load(KEY) is not None
    damage(store.folder / KEY.folder)

    assert store.load(KEY) is None
    assert "cache_entry_invalid" in caplog.text
    assert store.store(KEY, CONTENT)
    assert store.load(KEY) is not None


def test_folder_of_another_user_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is read from it or written to it, and serving goes on without."""
    CompiledModelCache(tmp_path / "cache", MODEL).store(KEY, CONTENT)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)

    store = CompiledModelCache(tmp_path / "cache", MODEL)

    assert "not a folder of this user" in store.error
    assert store.load(KEY) is None
    assert not store.store(KEY, CONTENT)
    assert "cache_unusable" in caplog.text


def test_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    """A blob is code: a folder where anybody may put one is no cache."""
    cache = tmp_path / "cache"
    (cache / "compiled").mkdir(parents=True)
    (cache / "compiled").chmod(0o777)

    assert "chmod 700" in CompiledModelCache(cache, MODEL).error


def test_unwritable_folder_is_told(tmp_path: Path) -> None:
    """A file where the folder should be, as good as a read-only disk: told, not raised."""
    (tmp_path / "cache").write_text("in the way")

    store = CompiledModelCache(tmp_path / "cache", MODEL)

    assert store.error
    with store.lock(KEY, 1.0):
        assert not store.store(KEY, CONTENT)


def test_full_disk_leaves_no_half_of_a_blob(
    store: CompiledModelCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A blob that does not fit is not kept, and what was written of it is removed."""

    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)

    assert not store.store(KEY, CONTENT)

    assert "cache_write_failed reason=No space left" in caplog.text
    assert list(store.folder.iterdir()) == []


def test_lock_makes_the_second_wait(store: CompiledModelCache) -> None:
    """Who comes second gets the lock when the first is done."""
    order: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with store.lock(KEY, 5.0):
            inside.set()
            leave.wait(5)
            order.append("first")

    holder = threading.Thread(target=first)
    holder.start()
    inside.wait(5)
    threading.Timer(0.1, leave.set).start()
    with store.lock(KEY, 5.0):
        order.append("second")
    holder.join()

    assert order == ["first", "second"]


def test_lock_that_is_never_given_back_has_a_deadline(store: CompiledModelCache) -> None:
    """A compiler that hangs elsewhere is a CompileFailed here, not a hang."""
    with (
        store.lock(KEY, 1.0),
        pytest.raises(CompileFailed) as caught,
        store.lock(KEY, 0.1),
    ):
        pass

    assert caught.value.reason is FailureReason.COMPILE_DEADLINE
