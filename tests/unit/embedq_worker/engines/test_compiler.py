"""Tests of the compiler process: answers, crashes, hangs and refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from tests.support.processes import is_running
from tests.support.redis import wait_for

from embedq_worker.engines.base import RowSpec
from embedq_worker.engines.compiler import CompileRequest, compile_in_subprocess, shapes_of
from embedq_worker.engines.openvino_runtime import CPU, DeviceTarget
from embedq_worker.errors import CompileFailed, FailureReason, ModelError
from embedq_worker.model.resolve import Model

PREAMBLE = "import json, os, signal, sys, time; job = json.load(sys.stdin); "


def compile_request(model: Model, target: DeviceTarget = CPU, identity: str = "") -> CompileRequest:
    """Return a request to compile the tiny model for a device, by default the CPU."""
    shapes = shapes_of(RowSpec.packed(24), 24)
    folder, cache = str(model.folder), str(model.folder / "cache")
    return CompileRequest(
        folder, model.label, identity or model.identity, cache, target, shapes, {}
    )


def script_command(script: str) -> list[str]:
    """Return a command that runs a script instead of the compiler."""
    return [sys.executable, "-c", PREAMBLE + script]


def test_blob_is_returned_through_the_descriptor(model: Model) -> None:
    script = "os.write(job['blob_fd'], b'blob' * 1000); print(json.dumps({'ok': True}))"

    assert (
        compile_in_subprocess(compile_request(model), 30, script_command(script)).tobytes()
        == b"blob" * 1000
    )


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.stderr.write('LLVM ERROR: out of luck'); sys.stderr.flush(); os.abort()", "LLVM"),
        ("os._exit(3)", "status 3"),
        ("print('not an answer')", "status 0"),
    ],
)
def test_crashed_compiler_is_reported_with_signal_or_status_and_stderr(
    model: Model, script: str, words: str
) -> None:
    no_core_dump = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "

    with pytest.raises(CompileFailed, match=words) as caught:
        compile_in_subprocess(compile_request(model), 30, script_command(no_core_dump + script))

    assert caught.value.reason is FailureReason.COMPILE_CRASHED


def test_compiler_is_killed_at_the_deadline(model: Model) -> None:
    began = time.monotonic()

    with pytest.raises(CompileFailed, match="EMBEDQ_COMPILE_TIMEOUT_S") as caught:
        compile_in_subprocess(compile_request(model), 0.5, script_command("time.sleep(60)"))

    assert caught.value.reason is FailureReason.COMPILE_DEADLINE
    assert time.monotonic() - began < 10


def test_real_compiler_process_returns_a_blob(model: Model) -> None:
    assert compile_in_subprocess(compile_request(model), 60).size > 1000


def test_missing_device_in_the_compiler_is_compile_failed(model: Model) -> None:
    with pytest.raises(CompileFailed, match="NPU") as caught:
        compile_in_subprocess(compile_request(model, DeviceTarget()), 60)

    assert caught.value.reason is FailureReason.COMPILE_FAILED


def test_model_with_another_identity_is_not_compiled(model: Model) -> None:
    with pytest.raises(ModelError, match="changed while"):
        compile_in_subprocess(compile_request(model, identity="0" * 64), 60)


def test_missing_python_raises_file_not_found(model: Model, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        compile_in_subprocess(compile_request(model), 1, [str(tmp_path / "python")])


ORPHANING = """
import json, os, signal, subprocess, sys
from embedq_worker.engines.compiler import COMMAND
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
process = subprocess.Popen(COMMAND, start_new_session=True, **pipes)
process.stdin.write(json.dumps({**json.loads(sys.argv[1]), "parent": os.getpid()}).encode())
process.stdin.close()
print(process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_compiler_whose_parent_has_died_does_not_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")  # opening it would block forever
    job = CompileRequest(os.fspath(tmp_path), "m", "0", os.fspath(tmp_path), CPU, {}, {})
    message = json.dumps({**asdict(job), "blob_fd": 1})

    command = [sys.executable, "-c", ORPHANING, message]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)

    pid = int(done.stdout)
    try:
        wait_for(lambda: not is_running(pid), "the compiler to end", 15)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
