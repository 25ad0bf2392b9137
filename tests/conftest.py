"""Fixtures for all tests: a clean environment, Redis servers, workers and clients."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from redis import Redis
from tests.support.cli import Command
from tests.support.files import SMALL
from tests.support.models import TEST_MODEL, tiny_model
from tests.support.redis import JOB_TTL_S, RedisProcess, delete_jobs
from tests.support.sysfs import DeviceTree
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.store.ledger import Ledger
from embedq_worker.model.resolve import Model

#: Variables that configure the tests themselves.
TEST_VARIABLES = ("EMBEDQ_TEST_MODEL", "EMBEDQ_TEST_NPU", "EMBEDQ_VENV")

# No deadline, because the machine may be busy; the same examples in every run.
hypothesis_settings.register_profile("embedq", deadline=None, derandomize=True)
hypothesis_settings.load_profile("embedq")

#: Folders whose tests run first: they take milliseconds and find most faults.
QUICK = frozenset({"unit", "conformance"})
#: Folders of slow files. They run next, so that no pytest worker starts one at the end.
LONG = frozenset({"chaos", "e2e"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark quick tests, and order tests: quick, slow, the rest."""
    root = Path(__file__).parent

    def rank(item: pytest.Item) -> int:
        folder = item.path.relative_to(root).parts[0]
        return 0 if folder in QUICK else 1 if folder in LONG else 2

    items.sort(key=rank)
    for item in items:
        if rank(item) == 0:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("EMBEDQ_") and name not in TEST_VARIABLES:
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def model_settings() -> dict[str, str]:
    """Return the settings that make a worker serve the real model, or skip."""
    if not TEST_MODEL:
        pytest.skip("no model files; set EMBEDQ_TEST_MODEL to their folder")
    return {"EMBEDQ_MODEL": TEST_MODEL}


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """Make a folder whose path is short enough for a unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="eq-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def redis(short_dir: Path) -> Iterator[RedisProcess]:
    server = RedisProcess(short_dir)
    yield server
    server.stop()


@pytest.fixture
def results(redis: RedisProcess) -> Iterator[Redis]:
    with redis.open() as client:
        yield client


@pytest.fixture
def ledger(results: Redis) -> Ledger:
    opened = Ledger(results, "job")
    opened.open(fingerprint=bytes(8), ttl_s=JOB_TTL_S, label="test")
    return opened


@pytest.fixture(scope="session")
def shared_dir() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="eq-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_redis(shared_dir: Path) -> Iterator[RedisProcess]:
    """Run a Redis for the session. Tests use the fixtures `worker` or `client`."""
    server = RedisProcess(shared_dir)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def shared_worker(shared_redis: RedisProcess, shared_dir: Path) -> Iterator[WorkerProcess]:
    """Run a stub worker for the session. Tests use the fixture `worker`."""
    with stub_worker(shared_redis, shared_dir, "shared") as worker:
        yield worker


@pytest.fixture
def worker(shared_worker: WorkerProcess, shared_redis: RedisProcess) -> Iterator[WorkerProcess]:
    """Return the shared stub worker after emptying Redis; fail if the test ends the worker."""
    delete_jobs(shared_redis)
    yield shared_worker
    assert shared_worker.process.poll() is None, f"The worker died:\n{shared_worker.log()[-4000:]}"


@pytest.fixture
def client(worker: WorkerProcess, shared_redis: RedisProcess) -> Iterator[Client]:
    with Client(settings=shared_redis.settings()) as opened:
        yield opened


@pytest.fixture
def command(tmp_path: Path, worker: WorkerProcess, shared_redis: RedisProcess) -> Command:
    """Return `embedq`, run in an empty folder against the shared worker."""
    return Command(tmp_path, shared_redis)


@pytest.fixture
def small(worker: WorkerProcess, shared_redis: RedisProcess) -> Iterator[Client]:
    with Client(settings=shared_redis.settings(**SMALL)) as opened:
        yield opened


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def tree(tmp_path: Path) -> DeviceTree:
    return DeviceTree(tmp_path / "tree")
