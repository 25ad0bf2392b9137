"""Tests of the supervisor: restarts, crash loops, signals, exit codes and orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from embedq_worker import exit_codes

#: Maximum seconds of one step on a busy machine.
DEADLINE_S = 20.0
#: Start of each script: `say` writes a line, `exit_on` exits with a code on a signal.
PREAMBLE = """
import os, signal, sys, time
from embedq_worker import exit_codes
from embedq_worker.main_process import supervisor
from embedq_worker.main_process.supervisor import SupervisedProcess
supervisor.FIRST_PAUSE_S = 0.001
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def exit_on(number, code):
    signal.signal(number, lambda *_: (say("got", number), os._exit(code)))
"""


@contextmanager
def supervised(
    body: str, workers: str = "[SupervisedProcess(run)]"
) -> Iterator[subprocess.Popen[str]]:
    """Run a script whose function `run` is the worker under the supervisor."""
    script = f"{PREAMBLE}{body}\nsys.exit(supervisor.supervise({workers}))"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def next_log_line(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline().strip()


def remaining_lines(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.read().splitlines()


@pytest.mark.parametrize("code", sorted(exit_codes.FINAL))
def test_final_exit_code_is_returned_without_a_restart(code: int) -> None:
    with supervised(f"def run(arguments): say('ran'); os._exit({code})") as process:
        assert process.wait(DEADLINE_S) == code
        assert remaining_lines(process) == ["ran"]


def test_worker_that_exits_is_restarted_with_the_attempt_number() -> None:
    body = """
def run(arguments):
    say(*arguments)
    if arguments[1] == "0": os.kill(os.getpid(), signal.SIGSEGV)
    os._exit(1 if arguments[1] == "1" else 0)
"""
    with supervised(body) as process:
        assert process.wait(DEADLINE_S) == exit_codes.OK
        assert remaining_lines(process) == ["--attempt 0", "--attempt 1", "--attempt 2"]


def test_crash_loop_gets_one_start_without_the_npu() -> None:
    body = """
def run(arguments):
    say(*arguments)
    if "--npu-off" in arguments: os._exit(exit_codes.CRASH_LOOP)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with supervised(body) as process:
        assert process.wait(DEADLINE_S) == exit_codes.CRASH_LOOP
        lines = remaining_lines(process)
    assert lines[:-1] == [f"--attempt {i}" for i in range(5)]
    assert lines[-1] == "--attempt 5 --npu-off"


def test_crash_loop_without_the_npu_ends_the_supervisor() -> None:
    with supervised("def run(arguments): os.kill(os.getpid(), signal.SIGKILL)") as process:
        assert process.wait(DEADLINE_S) == exit_codes.CRASH_LOOP


def test_strict_worker_with_a_failed_npu_is_not_restarted() -> None:
    body = """
def run(arguments):
    say(*arguments)
    os._exit(exit_codes.NPU_UNVERIFIED)
"""
    with supervised(body) as process:
        assert process.wait(DEADLINE_S) == exit_codes.NPU_UNVERIFIED
        assert remaining_lines(process) == ["--attempt 0"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_signal_is_forwarded_as_sigterm(sent: signal.Signals) -> None:
    body = """
def run(arguments):
    exit_on(signal.SIGTERM, 0); say("up")
    while True: signal.pause()
"""
    with supervised(body) as process:
        assert next_line(process) == "up"
        process.send_signal(sent)

        assert process.wait(DEADLINE_S) == 0
        assert remaining_lines(process) == [f"got {signal.SIGTERM}"]


def test_second_interrupt_is_forwarded_as_sigquit() -> None:
    body = """
def run(arguments):
    signal.signal(signal.SIGTERM, lambda *_: say("warm")); exit_on(signal.SIGQUIT, 9); say("up")
    while True: signal.pause()
"""
    with supervised(body) as process:
        assert next_line(process) == "up"
        process.send_signal(signal.SIGINT)
        assert next_line(process) == "warm"
        process.send_signal(signal.SIGINT)

        assert process.wait(DEADLINE_S) == 9
        assert remaining_lines(process) == [f"got {signal.SIGQUIT}"]


def test_worker_ended_by_sigterm_during_start_is_exit_code_0() -> None:
    with supervised(
        "def run(arguments):\n    say('up')\n    while True: signal.pause()"
    ) as process:
        assert next_line(process) == "up"
        process.terminate()

        assert process.wait(DEADLINE_S) == 0


def test_sigterm_during_a_restart_delay_ends_the_supervisor() -> None:
    body = """
supervisor.FIRST_PAUSE_S = supervisor.LONGEST_PAUSE_S = 600
def run(arguments): say("ran"); os._exit(1)
"""
    with supervised(body) as process:
        assert next_line(process) == "ran"
        assert (
            "worker_process_exited worker=worker reason='exit code 1' restart_in_s=600"
            in next_log_line(process)
        )
        process.terminate()

        assert process.wait(DEADLINE_S) == 0
        assert remaining_lines(process) == []


@pytest.mark.parametrize("platform", sorted({sys.platform, "darwin"}))
def test_worker_ends_with_a_killed_supervisor(platform: str) -> None:
    body = (
        f"supervisor.sys = type('sys', (), {{'platform': {platform!r}}})"
        + """
def run(arguments):
    for number in supervisor.STOPS: signal.signal(number, signal.SIG_IGN)
    say("up")
    while True: time.sleep(600)
"""
    )
    with supervised(body) as process:
        assert next_line(process) == "up"
        process.kill()

        assert remaining_lines(process) == []  # the pipe ends when no process holds it


def test_processes_forked_by_a_worker_end_with_it() -> None:
    body = """
def run(arguments):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN); say("forked")
        while True: time.sleep(600)
    signal.pause()
"""
    with supervised(body) as process:
        assert next_line(process) == "forked"
        process.terminate()

        assert process.wait(DEADLINE_S) == 0
        assert remaining_lines(process) == []


@pytest.mark.skipif(sys.platform != "linux", reason="adopts orphans as process 1 does")
def test_adopted_orphans_are_reaped() -> None:
    body = """
import ctypes
ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come here
supervisor_pid = os.getpid()
def run(arguments):
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(writer); os.read(reader, 1); say("orphan", os.getpid()); os._exit(0)
        os._exit(0)
    os.wait(); os.close(writer)
    exit_on(signal.SIGTERM, 0)
    while True: signal.pause()
"""
    with supervised(body) as process:
        orphan = next_line(process).split()[1]

        deadline = time.monotonic() + DEADLINE_S
        while os.path.exists(f"/proc/{orphan}"):  # noqa: PTH110 # a zombie has an entry too
            assert time.monotonic() < deadline, "The orphan is still a zombie."
            time.sleep(0.01)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_supervisor_continues_when_one_of_two_workers_ends() -> None:
    body = """
def run(arguments):
    part = arguments[1]
    if part == "npu": say("npu ends"); os._exit(exit_codes.DEVICE)
    exit_on(signal.SIGTERM, 0); say("cpu up")
    while True: signal.pause()
"""
    workers = (
        "[SupervisedProcess(run, ('--part', 'npu')), SupervisedProcess(run, ('--part', 'cpu'))]"
    )
    with supervised(body, workers) as process:
        assert {next_line(process), next_line(process)} == {"npu ends", "cpu up"}
        assert "worker_ended worker=npu exit_code=6" in next_log_line(process)
        process.terminate()

        assert process.wait(DEADLINE_S) == 0


def test_supervisor_imports_few_modules() -> None:
    # What the supervisor imports stays in memory as long as the worker runs.
    run = subprocess.run(
        [
            sys.executable,
            "-P",
            "-X",
            "importtime",
            "-c",
            "import embedq_worker.__main__, embedq_worker.main_process.supervisor",
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    imported = {entry.rpartition("|")[2].strip() for entry in run.stderr.splitlines()}
    assert "embedq_worker.main_process.supervisor" in imported
    heavy = {"click", "celery", "pydantic", "logging", "subprocess", "ctypes", "typing", "pathlib"}
    assert not imported & heavy
