"""Run the two Redis servers of production on loopback, with their configuration and users."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from redis import Redis
from tests.support.binaries import program
from tests.support.redis import answers, wait_for

ROOT = Path(__file__).parents[2]
OPS = ROOT / "ops"
DEPLOY = OPS / "deploy"
USERS = ("producer", "worker", "ops")
SERVERS = ("broker", "results")


def make_secrets(folder: Path, **variables: str) -> Path:
    target = folder / "secrets"
    subprocess.run(
        [OPS / "secrets", target], env={**os.environ, **variables}, check=True, capture_output=True
    )
    return target


class PortTaken(Exception):
    """A server exited at the start, because another process has taken its port."""


class Fleet:
    """Broker and results Redis as ops/deploy/redis configures them, and a superuser for tests."""

    def __init__(self, folder: Path, ports: dict[str, int]) -> None:
        server = program("redis-server", "redis-server")
        places = {f"REDIS_{name.upper()}": f"127.0.0.1:{ports[name]}/0" for name in SERVERS}
        self.secrets = make_secrets(folder, **places)
        self._processes = []
        self._ports = ports
        for name in SERVERS:
            data = folder / name
            data.mkdir()
            acl = folder / f"{name}.acl"
            users = (self.secrets / f"{name}_acl").read_text()
            acl.write_text(users + "user admin on nopass ~* &* +@all\n")
            own = ("--port", str(ports[name]), "--bind", "127.0.0.1", "--dir", os.fspath(data))
            configuration = os.fspath(DEPLOY / "redis" / f"{name}.conf")
            command = [server, configuration, *own, "--aclfile", os.fspath(acl)]
            self._processes.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
            )
        try:
            for name, process in zip(SERVERS, self._processes, strict=True):
                self._wait(name, process)
        except BaseException:
            self.stop()
            raise

    def admin(self, server: str) -> Redis:
        """Return a client with all permissions."""
        return Redis(port=self._ports[server], username="admin", password="x")

    def urls(self, user: str) -> dict[str, str]:
        """Return the settings with the URLs of a user."""
        return {
            f"EMBEDQ_{name.upper()}_URL": (self.secrets / f"{user}_{name}_url").read_text().strip()
            for name in SERVERS
        }

    def refusals(self) -> list[str]:
        """Return the entries of both ACL logs, and reset the logs."""
        found = []
        for name in SERVERS:
            with self.admin(name) as admin:
                for entry in admin.acl_log():
                    found.append(f"{name} {entry['username']} {entry['reason']} {entry['object']}")
                admin.acl_log_reset()
        return found

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        with self.admin(name) as admin:
            wait_for(lambda: process.poll() or answers(admin), f"{name} to answer")
        if process.poll() is not None:
            raise PortTaken(f"{name} exited with {process.poll()}")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
