"""Run the programs that monitor workers: exporter, Prometheus, Flower, browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
from tests.support.binaries import program
from tests.support.redis import RedisProcess, environment, wait_for

DEPLOY = Path(__file__).parents[2] / "ops" / "deploy"
#: Login of Flower.
USER = "ops:sesame"
#: Seconds in which a program must be ready.
START_S = 60.0


def free_port() -> int:
    """Return a free TCP port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def host() -> str:
    """Return the host name that Celery appends to the name of a worker."""
    return socket.gethostname()


def fetch(url: str, *, user: str = "", data: bytes | None = None) -> str:
    """Return the body of a URL; with data, of a POST request."""
    headers = {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if user else {}
    with urlopen(Request(url, data, headers), timeout=15) as answer:
        return str(answer.read().decode())


def answers(url: str) -> bool:
    try:
        return bool(fetch(url))
    except (URLError, OSError):
        return False


@contextmanager
def running(arguments: list[str], log: Path, ready: str, **variables: str) -> Iterator[None]:
    """Run a program inside the block; the block starts when the URL `ready` answers."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments, stdout=out, stderr=out, env=environment(**variables), cwd=log.parent
        )
    try:

        def is_ready() -> bool:
            if process.poll() is not None:
                pytest.fail(f"{arguments[0]} exited:\n{log.read_text(errors='replace')[-3000:]}")
            return answers(ready)

        wait_for(is_ready, f"{ready} to answer", START_S)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def urls(redis: RedisProcess) -> dict[str, str]:
    return {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}


@contextmanager
def exporter(redis: RedisProcess, folder: Path) -> Iterator[str]:
    """Run `embedq exporter` and yield its host and port."""
    at = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "embedq", "exporter", "--port", at.partition(":")[2]]
    with running(command, folder / "exporter.log", f"http://{at}/healthz", **urls(redis)):
        yield at


class Prometheus:
    """Client of a running Prometheus."""

    def __init__(self, address: str) -> None:
        self.address = address

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series of an expression now."""
        body = json.loads(fetch(f"{self.address}/api/v1/query?query={quote(expression)}"))
        result: list[dict[str, Any]] = body["data"]["result"]
        return result

    def firing(self) -> dict[str, dict[str, Any]]:
        """Return the firing alerts by name."""
        body = json.loads(fetch(f"{self.address}/api/v1/alerts"))
        alerts = [alert for alert in body["data"]["alerts"] if alert["state"] == "firing"]
        return {alert["labels"]["alertname"]: alert for alert in alerts}


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration of ops/deploy/prometheus, scraping `target`."""
    path = program("prometheus", "prometheus")
    config = (DEPLOY / "prometheus/prometheus.yml").read_text(encoding="utf-8")
    for name in ("rules.yml", "alerts.yml"):
        shutil.copy(DEPLOY / "prometheus" / name, folder)
    (folder / "prometheus.yml").write_text(config.replace("exporter:9469", target))
    at = f"127.0.0.1:{free_port()}"
    command = [path, "--config.file=prometheus.yml", "--storage.tsdb.path=tsdb"]
    command += [f"--web.listen-address={at}", "--log.level=warn"]
    with running(command, folder / "prometheus.log", f"http://{at}/-/ready"):
        yield Prometheus(f"http://{at}")


class Flower:
    """Client of a running Flower."""

    def __init__(self, at: str) -> None:
        self.at = at

    def api(self, path: str) -> Any:
        """Return the decoded answer of its API."""
        return json.loads(fetch(f"http://{self.at}/api/{path}", user=USER))

    def page(self, path: str) -> str:
        """Return the URL of a page, including the password."""
        return f"http://{USER}@{self.at}/{path}"


@contextmanager
def flower(redis: RedisProcess, folder: Path) -> Iterator[Flower]:
    """Run Flower with the configuration of ops/deploy/flower."""
    pytest.importorskip("flower")
    (folder / "auth").write_text(USER)
    at = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "celery", "--config=celeryconfig", "flower"]
    command += [f"--conf={DEPLOY / 'flower/flowerconfig.py'}", f"--db={folder / 'flower.db'}"]
    command += ["--address=127.0.0.1", f"--port={at.partition(':')[2]}"]
    paths = os.pathsep.join([os.fspath(DEPLOY / "flower"), environment().get("PYTHONPATH", "")])
    variables = {"PYTHONPATH": paths, "FLOWER_AUTH_FILE": os.fspath(folder / "auth")}
    log, ready = folder / "flower.log", f"http://{at}/healthcheck"
    with running(command, log, ready, **urls(redis), **variables):
        yield Flower(at)


def browse(url: str, picture: Path) -> str:
    """Open a page in a browser, save a screenshot, and return the page after its scripts ran."""
    chromium = program("chromium", "chromium")
    with tempfile.TemporaryDirectory(prefix="eq-browser-") as profile:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        quiet += ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        quiet += [f"--user-data-dir={profile}", "--window-size=1400,1000"]
        quiet += ["--virtual-time-budget=5000", "--timeout=20000"]
        command = [chromium, *quiet, f"--screenshot={picture}", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert picture.stat().st_size > 0, done.stderr[-2000:]
    return done.stdout
