"""The two Redis of production on loopback: their real configuration, their real users."""

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
    """Run ops/secrets into a folder."""
    target = folder / "secrets"
    subprocess.run(
        [OPS / "secrets", target], env={**os.environ, **variables}, check=True, capture_output=True
    )
    return target


class PortTaken(Exception):
    """A server ended at once; another process has its port by now."""


class Fleet:
    """Broker and results as ops/deploy/redis configures them, and a superuser for looking on."""

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
            acl.write_text(users + "user judge on nopass ~* &* +@all\n")
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

    def judge(self, server: str) -> Redis:
        """Return a client that may do everything."""
        return Redis(port=self._ports[server], username="judge", password="x")

    def urls(self, user: str) -> dict[str, str]:
        """Return the variables by which a user finds both."""
        return {
            f"EMBEDQ_{name.upper()}_URL": (self.secrets / f"{user}_{name}_url").read_text().strip()
            for name in SERVERS
        }

    def refusals(self) -> list[str]:
        """Return what was refused, and forget it."""
        found = []
        for name in SERVERS:
            with self.judge(name) as judge:
                for entry in judge.acl_log():
                    found.append(f"{name} {entry['username']} {entry['reason']} {entry['object']}")
                judge.acl_log_reset()
        return found

    def _wait(self, name: str, process: subprocess.Popen[bytes]) -> None:
        with self.judge(name) as judge:
            wait_for(lambda: process.poll() or answers(judge), f"{name} to answer")
        if process.poll() is not None:
            raise PortTaken(f"{name} ended with {process.poll()}")

    def stop(self) -> None:
        """End both."""
        for process in self._processes:
            process.kill()
            process.wait()
