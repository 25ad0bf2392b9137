"""Redis users have the permissions that they need and no others, on real servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.deployment import DEPLOY, SERVERS, USERS, Fleet, PortTaken, make_secrets
from tests.support.redis import environment, wait_for

from embedq import Client
from embedq.settings import ProducerSettings

pytestmark = pytest.mark.redis


def free_ports(count: int) -> list[int]:
    """Return free TCP ports; another process may take one before they are used."""
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind(("127.0.0.1", 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run both Redis; try again if another process takes a port first."""
    for _ in range(5):
        ports = dict(zip(SERVERS, free_ports(2), strict=True))
        with suppress(PortTaken):
            servers = Fleet(tmp_path_factory.mktemp("fleet"), ports)
            break
    else:
        pytest.fail("Redis exited at once five times; is it 7.0 or newer?")
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def worker(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run a stub worker with the login of the user `worker`; yield its log."""
    folder = tmp_path_factory.mktemp("worker")
    settings = {
        "EMBEDQ_NAME": "worker0",
        "EMBEDQ_DEVICE": "stub",
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "run"),
        "EMBEDQ_HEARTBEAT_S": "1",
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedq_worker", "start"],
            env=environment(**fleet.urls("worker"), **settings),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield log
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def client(fleet: Fleet) -> Client:
    """Return a Client with the login of the user `producer`."""
    urls = {name[7:].lower(): url for name, url in fleet.urls("producer").items()}
    return Client(settings=ProducerSettings.load(**urls, model="stub", startup_timeout_s=30))


def command(fleet: Fleet, user: str, *words: str) -> str:
    """Run a module with the login of a user, and return its stdout."""
    variables = environment(**fleet.urls(user), EMBEDQ_MODEL="stub")
    variables["PYTHONPATH"] += os.pathsep + os.fspath(DEPLOY / "flower")
    done = subprocess.run(
        [sys.executable, "-m", *words],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("worker")
def test_producer_and_worker_can_run_and_cancel_jobs(fleet: Fleet) -> None:
    with client(fleet) as sdk:
        # Enough texts that values are staged before the commit.
        vectors = sdk.encode([f"text {number}" for number in range(5000)])
        job = sdk.submit([f"text {number}" for number in range(5000)])
        job.cancel()

    assert vectors.shape == (5000, 384)
    assert fleet.refusals() == []


@pytest.mark.usefixtures("worker")
def test_ops_can_run_status_dead_and_celery_inspect(fleet: Fleet) -> None:
    with client(fleet) as sdk:
        sdk.encode(["one"])

    status = json.loads(command(fleet, "ops", "embedq", "status", "--json"))
    command(fleet, "ops", "embedq", "dead", "ls")
    stats = command(fleet, "ops", "celery", "--config=celeryconfig", "inspect", "ping")

    assert [found["worker"] for found in status["workers"]] == ["worker0"]
    assert "pong" in stats
    assert fleet.refusals() == []


@pytest.mark.usefixtures("worker")
def test_ops_can_run_the_exporter(fleet: Fleet) -> None:
    pytest.importorskip("prometheus_client")
    [port] = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, "-m", "embedq", "exporter", "--port", str(port)],
        env=environment(**fleet.urls("ops")),
        stderr=subprocess.DEVNULL,
    )

    def scrape() -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text = str(answer.read().decode())
        except OSError:
            return ""
        return text if 'embedq_worker_up{worker="worker0"} 1.0' in text else ""

    try:
        text = wait_for(scrape, "the exporter to see the worker")
    finally:
        process.terminate()
        process.wait(10)

    assert "embedq_up 1.0" in text
    assert 'embedq_queue_oldest_ready_age_seconds{queue="embed.npu"}' in text
    assert 'embedq_redis_memory_limit_bytes{instance="results"} 2.147483648e+09' in text
    assert fleet.refusals() == []


DESTRUCTIVE = (
    "FLUSHALL",
    "FLUSHDB",
    "SHUTDOWN",
    "SAVE",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "MONITOR",
    "DEBUG SLEEP 1",
    "CONFIG GET *",
    "CONFIG SET maxmemory 0",
    "ACL LIST",
    "ACL SETUSER x",
    "CLIENT KILL TYPE normal",
    "CLIENT LIST",
    "CLIENT PAUSE 1000",
    "SCRIPT FLUSH",
    "FUNCTION FLUSH",
    "MODULE LIST",
    "REPLICAOF h 1",
    "SWAPDB 0 1",
    "SET elsewhere 1",
    "GET elsewhere",
)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("user", USERS)
def test_no_user_can_run_destructive_commands(fleet: Fleet, server: str, user: str) -> None:
    """Nor commands that configure or enumerate, nor access other keys."""
    with fleet.admin(server) as admin:
        allowed = [
            words
            for words in DESTRUCTIVE
            if admin.execute_command("ACL", "DRYRUN", user, *words.split()) == b"OK"
        ]

    assert allowed == []


@pytest.mark.parametrize(
    ("server", "user", "words"),
    [
        ("broker", "producer", "BRPOP embed.npu 1"),  # would read texts of others
        ("broker", "producer", "DEL embed.npu"),
        ("broker", "producer", "HSET unacked tag message"),
        ("broker", "producer", "LPUSH unacked message"),
        ("broker", "producer", "PUBLISH /0.celery.pidbox shutdown"),  # would control a worker
        ("results", "producer", "SET embedq:worker:n beat"),  # would pose as a worker
        ("results", "producer", "SET embedq:paused 1"),
        ("results", "producer", "HSET embedq:orders n degraded"),
        ("results", "worker", "SET embedq:paused 1"),
        ("results", "worker", "HSET embedq:orders n degraded"),
        ("results", "worker", "ZREM embedq:jobs j"),
        ("broker", "ops", "LPUSH embed.npu message"),
        ("broker", "ops", "BRPOP embed.npu 1"),
        ("broker", "ops", "HDEL unacked tag"),
        ("results", "ops", "GET embedq:{j}:v:0:0"),  # would read vectors
        ("results", "ops", "HSET embedq:{j}:meta cancelled 1"),
        ("results", "ops", "SET embedq:worker:n beat"),
    ],
)
def test_no_user_has_the_permissions_of_another(
    fleet: Fleet, server: str, user: str, words: str
) -> None:
    with fleet.admin(server) as admin:
        answer = admin.execute_command("ACL", "DRYRUN", user, *words.split())

    assert answer != b"OK"


@pytest.mark.parametrize(
    ("user", "words"),
    [
        ("ops", "HSET embedq:orders n degraded"),
        ("ops", "SET embedq:paused 1 NX"),
        ("ops", "DEL embedq:paused"),
        ("ops", "ZRANGEBYSCORE embedq:workers -inf +inf"),
        ("worker", "HGET embedq:orders n"),
        ("worker", "EXISTS embedq:paused"),
    ],
)
def test_ops_writes_commands_and_worker_reads_them(fleet: Fleet, user: str, words: str) -> None:
    """The commands degrade, recover, pause and resume."""
    with fleet.admin("results") as admin:
        answer = admin.execute_command("ACL", "DRYRUN", user, *words.split())

    assert answer == b"OK"


@pytest.mark.parametrize("server", SERVERS)
def test_configuration_never_evicts_and_is_persistent(fleet: Fleet, server: str) -> None:
    with fleet.admin(server) as admin:
        found = admin.config_get("maxmemory*")
        persistence = admin.config_get("append*")
        info = admin.info()

    assert found["maxmemory-policy"] == "noeviction"
    assert int(found["maxmemory"]) > 0
    assert (persistence["appendonly"], persistence["appendfsync"]) == ("yes", "everysec")
    assert info["aof_enabled"] == 1
    assert info["redis_version"] >= "7"


def test_default_user_is_disabled(fleet: Fleet) -> None:
    with fleet.admin("broker") as admin:
        answer = admin.execute_command("ACL", "GETUSER", "default")

    assert b"off" in answer[b"flags"]


def test_secrets_are_random_private_and_stable(tmp_path: Path) -> None:
    """A second run changes nothing, and the ACL files contain no password."""
    first = make_secrets(tmp_path)
    before = {path.name: path.read_text() for path in first.iterdir()}

    make_secrets(tmp_path)

    after = {path.name: path.read_text() for path in first.iterdir()}
    passwords = {text for name, text in before.items() if name.endswith("_password")}
    assert before == after
    assert first.stat().st_mode & 0o777 == 0o700
    assert len(passwords) == 5
    assert all(len(password) == 64 for password in passwords)
    for server in SERVERS:
        assert not any(password in before[f"{server}_acl"] for password in passwords)
        assert "{" not in before[f"{server}_acl"].replace("{*}", "")
