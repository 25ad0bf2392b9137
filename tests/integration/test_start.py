"""`embedq-worker start` with real processes: restarts, exit codes, refused starts, strict jobs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tests.support.models import tiny_model
from tests.support.processes import is_running
from tests.support.redis import (
    DEADLINE_S,
    RedisProcess,
    environment,
    wait_for,
    wait_until_acknowledged,
)
from tests.support.workers import WorkerProcess, stub_worker

from embedq import Client
from embedq.errors import StrictUnavailable
from embedq.protocol.contract import Queue
from embedq.protocol.worker import WorkerStatus
from embedq.store.fleet import list_live_workers
from embedq.testing import stub_vectors
from embedq_worker import exit_codes

#: Settings of a stub that serves the queues of an NPU.
NPU = {"EMBEDQ_STUB_DEVICE": "npu"}
TEXTS = [f"text {i}" for i in range(50)]


@pytest.fixture(scope="module")
def tiny_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the settings of a worker that serves the tiny model from an empty cache."""
    folder = tmp_path_factory.mktemp("tiny")
    folder.chmod(0o700)
    tiny_model(folder)
    return {"EMBEDQ_MODEL": os.fspath(folder), "EMBEDQ_CACHE_DIR": os.fspath(folder / "cache")}


def run_command(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `embedq-worker` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "embedq_worker", *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


@contextmanager
def encoding(redis: RedisProcess) -> Iterator[list[object]]:
    """Encode in a thread during the block; the vectors are appended to the list."""
    results: list[object] = []

    def encode() -> None:
        with Client(settings=redis.settings()) as client:
            results.append(client.encode(TEXTS))

    thread = threading.Thread(target=encode)
    thread.start()
    try:
        yield results
    finally:
        thread.join()


def test_supervisor_restarts_a_killed_worker(redis: RedisProcess, short_dir: Path) -> None:
    """The pool process ends with the main process."""
    with stub_worker(redis, short_dir, "phoenix") as worker:
        before = worker.pids()
        os.kill(before[0], signal.SIGKILL)

        def restarted() -> bool:
            pids = worker.pids()
            return not {0, *before} & set(pids)

        wait_for(restarted, "the worker to restart")
        with Client(settings=redis.settings()) as client:
            vectors = client.encode(TEXTS)

        assert np.array_equal(vectors, stub_vectors(TEXTS))
        assert not any(map(is_running, before))
        assert len(worker.lines("worker_process_exited", "signal 9")) == 1


def test_supervisor_exits_after_a_crash_loop(redis: RedisProcess, short_dir: Path) -> None:
    worker = WorkerProcess(redis, short_dir, "doomed")
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
    try:
        for _ in range(5):
            pid = wait_for(lambda: children.read_text().strip(), "the worker")
            os.kill(int(pid), signal.SIGKILL)
            wait_for(lambda pid=pid: not is_running(int(pid)), "its end")  # type: ignore[misc] # bound

        assert worker.process.wait(DEADLINE_S) == exit_codes.CRASH_LOOP
    finally:
        worker.stop()
    assert len(worker.lines("worker_crash_loop", "crashes=5")) == 1


def test_worker_commits_its_batch_after_sigterm(redis: RedisProcess, short_dir: Path) -> None:
    with (
        stub_worker(redis, short_dir, "leaving", EMBEDQ_STUB_TEXTS_PER_S="50") as worker,
        redis.open() as results,
        encoding(redis) as vectors,
    ):
        wait_for(lambda: list(results.scan_iter("embedq:{*}:tries")), "a batch to begin")
        worker.process.terminate()

        assert worker.process.wait(DEADLINE_S) == 0
    assert np.array_equal(np.asarray(vectors[0]), stub_vectors(TEXTS))
    assert len(worker.lines("batch_done")) == 1


def test_sigterm_ends_a_worker_whose_device_hangs_at_the_start(
    redis: RedisProcess, short_dir: Path
) -> None:
    """It has no batch yet, so there is nothing to wait for."""
    script = short_dir / "faults"
    script.write_text("init=hang\n")
    worker = WorkerProcess(redis, short_dir, "slow", EMBEDQ_STUB_FAULTS=os.fspath(script))
    try:
        wait_for(lambda: worker.pool_pid() and worker.lines("ready."), "the pool process to start")
        wait_for(script.with_name("faults.struck").exists, "its device to hang")

        worker.process.terminate()

        assert worker.process.wait(DEADLINE_S) == 0
    finally:
        worker.stop()


def test_worker_ends_with_its_supervisor(redis: RedisProcess, short_dir: Path) -> None:
    with stub_worker(redis, short_dir, "orphans") as worker:
        pids = worker.pids()
        worker.process.kill()
        worker.process.wait()

        wait_for(lambda: not any(map(is_running, pids)), "main process and pool process to end")


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        ({"EMBEDQ_DEVICE": "nup"}, exit_codes.SETTINGS, "got nup."),
        ({"EMBEDQ_STRICT": "1", "EMBEDQ_DEVICE": "cpu"}, exit_codes.SETTINGS, "exclude each other"),
        ({"EMBEDQ_DEVICE": "cpu", "EMBEDQ_MODEL": "/nowhere"}, exit_codes.MODEL, "/nowhere"),
    ],
)
def test_start_with_wrong_settings_exits_without_a_restart(
    settings: dict[str, str], code: int, words: str, short_dir: Path
) -> None:
    done = run_command("start", EMBEDQ_RUNTIME_DIR=os.fspath(short_dir / "run"), **settings)

    assert done.returncode == code
    assert words in done.stderr
    assert "worker_process_exited" not in done.stderr


def test_second_worker_with_the_same_name_is_refused(redis: RedisProcess, short_dir: Path) -> None:
    """Both would write the same status file."""
    with stub_worker(redis, short_dir, "twin") as worker:
        before = worker.pids()
        done = run_command(
            "start",
            EMBEDQ_NAME="twin",
            EMBEDQ_DEVICE="stub",
            EMBEDQ_BROKER_URL=redis.broker_url(),
            EMBEDQ_RESULTS_URL=redis.results_url(),
            EMBEDQ_RUNTIME_DIR=os.fspath(worker.runtime_dir),
        )

        assert done.returncode == exit_codes.SETTINGS
        assert "A worker twin already runs on this machine" in done.stderr
        assert "--name NAME" in done.stderr
        assert worker.pids() == before


@pytest.mark.parametrize("which", ["BROKER", "RESULTS"])
def test_start_with_a_wrong_password_exits(which: str, short_dir: Path) -> None:
    """The message names the variable and does not contain the password."""
    redis = RedisProcess(short_dir, password="right")
    urls = {"BROKER": redis.broker_url(), "RESULTS": redis.results_url()}
    urls[which] = urls[which].replace("right", "wr0ng")
    settings = {f"EMBEDQ_{name}_URL": url for name, url in urls.items()}
    try:
        done = run_command(
            "start",
            EMBEDQ_DEVICE="stub",
            EMBEDQ_RUNTIME_DIR=os.fspath(short_dir / "run"),
            **settings,
        )
    finally:
        redis.stop()

    assert done.returncode == exit_codes.SETTINGS
    assert f"EMBEDQ_{which}_URL: Redis at" in done.stderr
    assert "refused the password" in done.stderr
    assert "wr0ng" not in done.stderr


@pytest.mark.parametrize(
    ("fault", "code"), [("raise", exit_codes.ENGINE), ("exit", exit_codes.CRASH_LOOP)]
)
def test_last_heartbeat_of_a_failed_worker_reports_failed(
    fault: str, code: int, redis: RedisProcess, short_dir: Path
) -> None:
    """The alert EmbedqWorkerFailed depends on it."""
    script = short_dir / "faults"
    script.write_text(f"init={fault}\n")
    worker = WorkerProcess(redis, short_dir, "lost", EMBEDQ_STUB_FAULTS=os.fspath(script))
    try:
        assert worker.process.wait(DEADLINE_S) == code
        with redis.open() as results:
            [last] = list_live_workers(results)
    finally:
        worker.stop()

    assert (last.worker, last.state, last.device, last.model_info) == ("lost", "failed", "", None)
    assert last.reason


@pytest.mark.skipif(Path("/dev/accel").exists(), reason="this machine may have an NPU")
@pytest.mark.parametrize("settings", [{"EMBEDQ_DEVICE": "npu"}, {"EMBEDQ_STRICT": "1"}])
def test_start_without_the_required_npu_exits(settings: dict[str, str], short_dir: Path) -> None:
    done = run_command("start", EMBEDQ_RUNTIME_DIR=os.fspath(short_dir / "run"), **settings)

    assert done.returncode == exit_codes.DEVICE
    assert "NPU" in done.stderr


@pytest.mark.parametrize("option", ["--strict", "--device=cpu"])
def test_all_and_options_for_one_worker_exclude_each_other(option: str, short_dir: Path) -> None:
    done = run_command("start", "--all", option, EMBEDQ_RUNTIME_DIR=os.fspath(short_dir / "run"))

    assert done.returncode == exit_codes.SETTINGS
    assert re.search("--all and EMBEDQ_(STRICT|DEVICE=cpu) exclude each other", done.stderr)


def test_help_names_every_exit_code() -> None:
    done = run_command("start", "--help")

    codes = {
        value for name, value in vars(exit_codes).items() if name.isupper() and name != "EPILOG"
    }
    numbers = {code for code in codes if isinstance(code, int)} - {exit_codes.FAILURE}
    assert done.returncode == 0
    assert all(f"{code} " in done.stdout for code in numbers)


def test_strict_job_is_served_by_the_npu_worker_only(
    worker: WorkerProcess, shared_redis: RedisProcess, short_dir: Path
) -> None:
    wait_until_acknowledged(shared_redis)
    before = len(worker.lines("batch_"))
    with (
        stub_worker(shared_redis, short_dir, "npu", **NPU) as npu,
        Client(settings=shared_redis.settings(strict=True)) as client,
    ):
        vectors = client.encode(TEXTS)

        assert np.array_equal(vectors, stub_vectors(TEXTS))
        wait_until_acknowledged(shared_redis)
        assert len(npu.lines("batch_done")) == 1
        assert len(worker.lines("batch_")) == before


def test_strict_job_fails_without_an_npu_worker(
    worker: WorkerProcess, shared_redis: RedisProcess
) -> None:
    wait_until_acknowledged(shared_redis)
    before = len(worker.lines("batch_"))
    with (
        Client(settings=shared_redis.settings(startup_timeout_s=1)) as client,
        pytest.raises(StrictUnavailable, match="1 alive, none with an NPU"),
    ):
        client.encode(TEXTS, strict=True)

    assert len(worker.lines("batch_")) == before
    with shared_redis.open(0) as broker:
        # The worker that receives it skips it, because its job is gone.
        assert broker.llen(str(Queue.NPU_STRICT)) == 1


def test_devices_check_and_warm_agree_with_start(redis: RedisProcess, short_dir: Path) -> None:
    settings = {
        "EMBEDQ_BROKER_URL": redis.broker_url(),
        "EMBEDQ_RESULTS_URL": redis.results_url(),
        "EMBEDQ_RUNTIME_DIR": os.fspath(short_dir / "run"),
        "EMBEDQ_CACHE_DIR": os.fspath(short_dir / "cache"),
        "EMBEDQ_DEVICE": "stub",
    }
    devices = run_command("devices", **settings)
    check = run_command("check", **settings)
    warm = run_command("warm", **settings)

    assert "start would compute on: stub" in devices.stdout
    assert (devices.returncode, warm.returncode) == (0, 0)
    assert "stub is ready: stub on stub" in warm.stdout
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize(
    ("settings", "failed"),
    [
        ({"EMBEDQ_DEVICE": "stub", "EMBEDQ_BROKER_URL": "redis://127.0.0.1:1/0"}, "broker"),
        ({"EMBEDQ_MODEL": "/nowhere", "EMBEDQ_DEVICE": "cpu"}, "model"),
        ({"EMBEDQ_DEVICE": "stub", "EMBEDQ_RUNTIME_DIR": "/proc/1/no"}, "folders"),
    ],
)
def test_failed_check_has_a_detail_and_a_fix(
    settings: dict[str, str], failed: str, redis: RedisProcess, short_dir: Path
) -> None:
    urls = {"EMBEDQ_BROKER_URL": redis.broker_url(), "EMBEDQ_RESULTS_URL": redis.results_url()}
    folders = {f"EMBEDQ_{name}_DIR": f"{short_dir}/{name}" for name in ("RUNTIME", "CACHE")}

    done = run_command("check", "--json", **{**urls, **folders, **settings})

    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"]) == (exit_codes.CHECK, False)
    [line] = [line for line in found["checks"] if line["level"] == "fail"]
    assert line["name"] == failed
    assert line["detail"] and line["fix"]


@pytest.mark.skipif(Path("/dev/accel").exists(), reason="this machine may have an NPU")
def test_all_without_an_npu_serves_on_the_cpu(
    redis: RedisProcess, short_dir: Path, tiny_settings: dict[str, str]
) -> None:
    """The NPU worker exits; the CPU worker serves and exits with 0 after SIGTERM."""
    log_path = short_dir / "all.log"
    settings = {
        "EMBEDQ_BROKER_URL": redis.broker_url(),
        "EMBEDQ_RESULTS_URL": redis.results_url(),
        "EMBEDQ_RUNTIME_DIR": os.fspath(short_dir / "run"),
        "EMBEDQ_NAME": "both",
    }
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "embedq_worker", "start", "--all"],
            env=environment(**tiny_settings, **settings),
            stderr=log,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "serving worker=both-cpu" in log_path.read_text(), "the worker on the CPU")
        wait_for(
            lambda: "worker_ended worker=npu exit_code=6" in log_path.read_text(),
            "the NPU worker to exit",
        )
        process.terminate()

        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("strict", ["0", "1"])
def test_worker_whose_npu_does_not_compile(
    strict: str,
    redis: RedisProcess,
    short_dir: Path,
    tiny_settings: dict[str, str],
) -> None:
    """It degrades; a strict worker exits."""
    pytest.importorskip("openvino")
    hanging = {
        "EMBEDQ_DEVICE": "npu",
        "EMBEDQ_NPU_EMULATION": "alias",
        "EMBEDQ_COMPILE_TIMEOUT_S": "0.01",
        "EMBEDQ_CPU_FALLBACK": "0",
        "EMBEDQ_STRICT": strict,
    }
    worker = WorkerProcess(redis, short_dir, "unverified", **hanging, **tiny_settings)
    try:
        if strict == "1":
            assert worker.process.wait(DEADLINE_S) == exit_codes.NPU_UNVERIFIED
            assert "EMBEDQ_STRICT keeps this worker off the CPU" in worker.log()
            return
        degraded = wait_for(
            lambda: (found := worker.heartbeat()) and found.state == "degraded" and found,
            "the worker to be degraded",
        )

        assert isinstance(degraded, WorkerStatus)
        assert (degraded.assigned_device, degraded.device) == ("npu", "")
        assert degraded.reason.startswith("Compiling ")
        assert len(worker.lines("device_chosen")) == 1
    finally:
        worker.stop()
