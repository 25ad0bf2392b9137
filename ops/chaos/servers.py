"""Start, kill and fill a Redis server with AOF, as in production."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

from redis import Redis
from redis.exceptions import RedisError

from embedq.store.connection import open_redis

#: maxmemory of each Redis, in bytes.
MAXMEMORY: Final = 32 * 2**20


class RedisServer:
    """A Redis server with AOF on a unix socket, in its own folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._folder = folder / name
        self._folder.mkdir()
        self._socket = self._folder / "s"
        self._process: subprocess.Popen[bytes] | None = None
        self.peak_bytes = 0
        self.restarts = -1
        self.start()
        self.client: Redis = open_redis(self.url, timeout_s=2)

    @property
    def url(self) -> str:
        """URL for redis-py."""
        return f"unix://{self._socket}?db=0"

    @property
    def kombu_url(self) -> str:
        """URL for kombu."""
        return f"redis+socket://{self._socket}?virtual_host=0"

    def start(self) -> None:
        """Start the server, or restart it on its append-only file."""
        program = shutil.which("redis-server")
        if program is None:
            sys.exit("ops/chaos/run: redis-server is missing. Debian: apt install redis-server")
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "dir": str(self._folder),
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "auto-aof-rewrite-min-size": "16mb",
            "maxmemory": str(MAXMEMORY),
            "maxmemory-policy": "noeviction",
        }
        flags = [word for key, value in options.items() for word in (f"--{key}", value)]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, *flags], stdout=log, stderr=log, start_new_session=True
            )
        self.restarts += 1

    def is_up(self) -> bool:
        """Return whether the process runs; it may still be loading."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Send SIGKILL to the server."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def fill(self) -> bool:
        """Let the server refuse writes; return False if it does not answer."""
        with suppress(RedisError):
            used = int(self.client.info("memory")["used_memory"])
            return bool(self.client.config_set("maxmemory", used - 2**16))
        return False

    def empty(self) -> None:
        """Restore the memory limit of the server."""
        with suppress(RedisError):
            self.client.config_set("maxmemory", MAXMEMORY)

    def measure(self) -> None:
        """Record the peak memory of the server."""
        with suppress(RedisError):
            peak = int(self.client.info("memory")["used_memory_peak"])
            self.peak_bytes = max(self.peak_bytes, peak)
