"""A compiler that crashes, hangs or refuses is an error with a reason, and takes nobody along."""

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

from embedq_worker.engines.compiler import CompileRequest, compile_in_child
from embedq_worker.engines.openvino_runtime import CPU, DeviceTarget
from embedq_worker.errors import CompileFailed, FailureReason, ModelError
from embedq_worker.model.resolve import Model

PREAMBLE = "import json, os, signal, sys, time; job = json.load(sys.stdin); "


def job_of(model: Model, target: DeviceTarget = CPU, **others: str) -> CompileRequest:
    """Describe a compile of the tiny model for the CPU, which needs no plugin of an emulated
    NPU.
    """
    shapes = {"input_ids": [1, 24], "position_ids": [1, 24], "segment_ids": [1, 24]}
    job = CompileRequest.of(model, model.folder / "cache", target, {**shapes, "segments": [12]}, {})
    return CompileRequest(
        **{**{name: getattr(job, name) for name in CompileRequest.__slots__}, **others}
    )


def compiler(script: str) -> list[str]:
    """Return a command that is run in the place of the compiler."""
    return [sys.executable, "-c", PREAMBLE + script]


def test_blob_comes_back_through_the_descriptor(model: Model) -> None:
    """What the child writes is what the parent gets, and no file is left anywhere."""
    script = "os.write(job['blob_fd'], b'blob' * 1000); print(json.dumps({'ok': True}))"

    assert compile_in_child(job_of(model), 30, compiler(script)).tobytes() == b"blob" * 1000


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("sys.stderr.write('LLVM ERROR: out of luck'); sys.stderr.flush(); os.abort()", "LLVM"),
        ("os._exit(3)", "status 3"),
        ("print('not an answer')", "status 0"),
    ],
)
def test_compiler_that_dies_is_a_crash(model: Model, script: str, words: str) -> None:
    """The message has the signal or the status and the compiler's own last words."""
    quiet = "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); "

    with pytest.raises(CompileFailed, match=words) as caught:
        compile_in_child(job_of(model), 30, compiler(quiet + script))

    assert caught.value.reason is FailureReason.COMPILE_CRASHED


def test_compiler_that_hangs_is_stopped(model: Model) -> None:
    """After the deadline the child and what it started are killed."""
    began = time.monotonic()

    with pytest.raises(CompileFailed, match="EMBEDQ_COMPILE_TIMEOUT_S") as caught:
        compile_in_child(job_of(model), 0.5, compiler("time.sleep(60)"))

    assert caught.value.reason is FailureReason.COMPILE_DEADLINE
    assert time.monotonic() - began < 10


def test_real_child_compiles(model: Model) -> None:
    """The command that production uses gives a blob."""
    assert compile_in_child(job_of(model), 60).size > 1000


def test_refusal_comes_back_as_a_sentence(model: Model) -> None:
    """A device that the child does not find is a CompileFailed that names it."""
    with pytest.raises(CompileFailed, match="NPU") as caught:
        compile_in_child(job_of(model, DeviceTarget()), 60)

    assert caught.value.reason is FailureReason.COMPILE_FAILED


def test_model_that_changed_meanwhile_is_not_compiled(model: Model) -> None:
    """A blob belongs to the identity it is named by: other files are a ModelError."""
    with pytest.raises(ModelError, match="has changed"):
        compile_in_child(job_of(model, identity="0" * 64), 60)


def test_missing_program_is_not_ours_to_hide(model: Model, tmp_path: Path) -> None:
    """Where there is no Python to run, the system's own error comes out."""
    with pytest.raises(FileNotFoundError):
        compile_in_child(job_of(model), 1, [str(tmp_path / "python")])


ORPHANING = """
import json, os, signal, subprocess, sys
from embedq_worker.engines.compiler import COMMAND
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
child = subprocess.Popen(COMMAND, start_new_session=True, **pipes)
child.stdin.write(json.dumps({**json.loads(sys.argv[1]), "parent": os.getpid()}).encode())
child.stdin.close()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_compiler_whose_parent_died_before_it_looked_does_not_begin(tmp_path: Path) -> None:
    """Nobody holds the device's lock for it any more, and no deadline ends it."""
    os.mkfifo(tmp_path / "config.json")  # whoever opens it waits for ever
    job = CompileRequest(os.fspath(tmp_path), "m", "0", os.fspath(tmp_path), {}, {}, {})
    message = json.dumps({**asdict(job), "blob_fd": 1})

    command = [sys.executable, "-c", ORPHANING, message]
    done = subprocess.run(command, capture_output=True, timeout=30, check=False)

    pid = int(done.stdout)
    try:
        wait_for(lambda: not is_running(pid), "the compiler to end", 15)
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
