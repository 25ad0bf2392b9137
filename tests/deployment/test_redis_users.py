"""Each user of Redis can do its work and nothing else, on real servers with the real files."""

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
    """Return ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Run both Redis, on other ports if somebody takes one between our look and their start."""
    for _ in range(5):
        ports = dict(zip(SERVERS, free_ports(2), strict=True))
        with suppress(PortTaken):
            servers = Fleet(tmp_path_factory.mktemp("fleet"), ports)
            break
    else:
        pytest.fail("Redis ended five times at once; is it 7.0 or newer?")
    yield servers
    servers.stop()


@pytest.fixture(scope="module")
def worker(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run a stub worker as the user worker; yield its log."""
    folder = tmp_path_factory.mktemp("worker")
    own = {
        "EMBEDQ_NAME": "guarded",
        "EMBEDQ_DEVICE": "stub",
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_RUNTIME_DIR": os.fspath(folder / "run"),
        "EMBEDQ_HEARTBEAT_S": "1",
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedq_worker", "start"],
            env=environment(**fleet.urls("worker"), **own),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield log
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(30)


def client(fleet: Fleet) -> Client:
    """Return an SDK client as the user producer."""
    urls = {name[7:].lower(): url for name, url in fleet.urls("producer").items()}
    return Client(settings=ProducerSettings.load(**urls, model="stub", startup_timeout_s=30))


def command(fleet: Fleet, user: str, *words: str) -> str:
    """Run a module as a user and return what it says on stdout."""
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
def test_producer_and_worker_can_run_a_job_and_cancel_another(fleet: Fleet) -> None:
    """A job runs from SDK to worker and back, and one is cancelled, with nothing refused."""
    with client(fleet) as sdk:
        # Enough for values that are staged while the rest is computed.
        vectors = sdk.encode([f"text {number}" for number in range(5000)])
        job = sdk.submit([f"text {number}" for number in range(5000)])
        job.cancel()

    assert vectors.shape == (5000, 384)
    assert fleet.refusals() == []


@pytest.mark.usefixtures("worker")
def test_operator_can_look_at_everything(fleet: Fleet) -> None:
    """Status, dead letters and `celery inspect` answer the user ops, with nothing refused."""
    with client(fleet) as sdk:
        sdk.encode(["one"])

    status = json.loads(command(fleet, "ops", "embedq", "status", "--json"))
    command(fleet, "ops", "embedq", "dead", "ls")
    stats = command(fleet, "ops", "celery", "--config=celeryconfig", "inspect", "ping")

    assert [found["worker"] for found in status["workers"]] == ["guarded"]
    assert "pong" in stats
    assert fleet.refusals() == []


@pytest.mark.usefixtures("worker")
def test_exporter_needs_no_more_than_the_user_ops_has(fleet: Fleet) -> None:
    """The exporter sees both Redis, the worker and the ages of queues as the user ops."""
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
        return text if 'embedq_worker_up{worker="guarded"} 1.0' in text else ""

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
def test_nobody_can_empty_configure_or_list_a_redis(fleet: Fleet, server: str, user: str) -> None:
    """Commands that destroy, configure or enumerate are refused, and keys that are not ours."""
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
        ("broker", "producer", "BRPOP embed.npu 1"),  # take texts of others
        ("broker", "producer", "DEL embed.npu"),
        ("broker", "producer", "HSET unacked tag message"),
        ("broker", "producer", "LPUSH unacked message"),
        ("broker", "producer", "PUBLISH /0.celery.pidbox shutdown"),  # command a worker
        ("results", "producer", "SET embedq:worker:n beat"),  # pretend to be a worker
        ("results", "producer", "SET embedq:paused 1"),
        ("results", "producer", "HSET embedq:orders n degraded"),
        ("results", "worker", "SET embedq:paused 1"),
        ("results", "worker", "HSET embedq:orders n degraded"),
        ("results", "worker", "ZREM embedq:jobs j"),
        ("broker", "ops", "LPUSH embed.npu message"),
        ("broker", "ops", "BRPOP embed.npu 1"),
        ("broker", "ops", "HDEL unacked tag"),
        ("results", "ops", "GET embedq:{j}:v:0:0"),  # a customer's vectors
        ("results", "ops", "HSET embedq:{j}:meta cancelled 1"),
        ("results", "ops", "SET embedq:worker:n beat"),
    ],
)
def test_no_user_can_do_the_work_of_another(
    fleet: Fleet, server: str, user: str, words: str
) -> None:
    """A stolen password of one role is not a password of the others."""
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
def test_orders_are_given_by_ops_and_heard_by_workers(fleet: Fleet, user: str, words: str) -> None:
    """What degrade, recover, pause and resume write, workers can read."""
    with fleet.admin("results") as admin:
        answer = admin.execute_command("ACL", "DRYRUN", user, *words.split())

    assert answer == b"OK"


@pytest.mark.parametrize("server", SERVERS)
def test_configuration_keeps_what_it_accepts(fleet: Fleet, server: str) -> None:
    """Both refuse rather than evict, have a limit, and write every command to disk in a second."""
    with fleet.admin(server) as admin:
        found = admin.config_get("maxmemory*")
        persistence = admin.config_get("append*")
        info = admin.info()

    assert found["maxmemory-policy"] == "noeviction"
    assert int(found["maxmemory"]) > 0
    assert (persistence["appendonly"], persistence["appendfsync"]) == ("yes", "everysec")
    assert info["aof_enabled"] == 1
    assert info["redis_version"] >= "7"


def test_without_a_login_nothing_is_answered(fleet: Fleet) -> None:
    """The default user is off."""
    with fleet.admin("broker") as admin:
        answer = admin.execute_command("ACL", "GETUSER", "default")

    assert b"off" in answer[b"flags"]


def test_secrets_are_random_private_and_kept(tmp_path: Path) -> None:
    """A second run changes nothing; passwords differ and stand in no ACL file."""
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
