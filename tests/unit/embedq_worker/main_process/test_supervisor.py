"""The supervisor: restarts, crash loops, signals, exit codes, and nothing left behind."""

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

#: Seconds that any one thing may take on a busy machine.
DEADLINE_S = 20.0
#: What each script begins with: `say` writes a line, `SupervisedProcess` is the supervisor's.
PREAMBLE = """
import os, signal, sys, time
from embedq_worker import exit_codes
from embedq_worker.main_process import supervisor
from embedq_worker.main_process.supervisor import SupervisedProcess
supervisor.FIRST_PAUSE_S = 0.001
def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def until(number, code):
    signal.signal(number, lambda *_: (say("got", number), os._exit(code)))
"""


@contextmanager
def supervised(
    body: str, workers: str = "[SupervisedProcess(run)]"
) -> Iterator[subprocess.Popen[str]]:
    """Run a script whose function `run` is the worker."""
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


def line(process: subprocess.Popen[str]) -> str:
    """Return the next line that the script says."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def event(process: subprocess.Popen[str]) -> str:
    """Return the next line that the supervisor logs."""
    assert process.stderr is not None
    return process.stderr.readline().strip()


def rest(process: subprocess.Popen[str]) -> list[str]:
    """Return what the script says until nobody can say more."""
    assert process.stdout is not None
    return process.stdout.read().splitlines()


@pytest.mark.parametrize("code", sorted(exit_codes.FINAL))
def test_final_code_is_passed_on_without_a_restart(code: int) -> None:
    """A wrong setting or a missing device is not mended by trying again."""
    with supervised(f"def run(arguments): say('ran'); os._exit({code})") as process:
        assert process.wait(DEADLINE_S) == code
        assert rest(process) == ["ran"]


def test_worker_that_dies_is_started_again() -> None:
    """A worker killed by a signal, or ended by an error, comes back; each start knows its
    number.
    """
    body = """
def run(arguments):
    say(*arguments)
    if arguments[1] == "0": os.kill(os.getpid(), signal.SIGSEGV)
    os._exit(1 if arguments[1] == "1" else 0)
"""
    with supervised(body) as process:
        assert process.wait(DEADLINE_S) == exit_codes.OK
        assert rest(process) == ["--attempt 0", "--attempt 1", "--attempt 2"]


def test_crash_loop_ends_with_its_own_code() -> None:
    """A worker that keeps dying gets one start without its NPU, and refuses it if it has none."""
    body = """
def run(arguments):
    say(*arguments)
    if "--npu-off" in arguments: os._exit(exit_codes.CRASH_LOOP)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    with supervised(body) as process:
        assert process.wait(DEADLINE_S) == exit_codes.CRASH_LOOP
        lines = rest(process)
    assert lines[:-1] == [f"--attempt {i}" for i in range(5)]
    assert lines[-1] == "--attempt 5 --npu-off"


def test_crash_loop_without_the_npu_ends_too() -> None:
    """A worker that dies on its CPU as well is kept off."""
    with supervised("def run(arguments): os.kill(os.getpid(), signal.SIGKILL)") as process:
        assert process.wait(DEADLINE_S) == exit_codes.CRASH_LOOP


def test_strict_worker_without_a_proven_npu_is_not_started_again() -> None:
    """It has nothing else to serve with; other workers degrade without ending."""
    body = """
def run(arguments):
    say(*arguments)
    os._exit(exit_codes.NPU_UNPROVEN)
"""
    with supervised(body) as process:
        assert process.wait(DEADLINE_S) == exit_codes.NPU_UNPROVEN
        assert rest(process) == ["--attempt 0"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_stop_reaches_the_worker_as_sigterm(sent: signal.Signals) -> None:
    """However the end is asked for, the worker ends in good order and its code is the answer."""
    body = """
def run(arguments):
    until(signal.SIGTERM, 0); say("up")
    while True: signal.pause()
"""
    with supervised(body) as process:
        assert line(process) == "up"
        process.send_signal(sent)

        assert process.wait(DEADLINE_S) == 0
        assert rest(process) == [f"got {signal.SIGTERM}"]


def test_second_interrupt_ends_the_worker_now() -> None:
    """Ctrl-C once ends in good order, twice at once, as Celery has it."""
    body = """
def run(arguments):
    signal.signal(signal.SIGTERM, lambda *_: say("warm")); until(signal.SIGQUIT, 9); say("up")
    while True: signal.pause()
"""
    with supervised(body) as process:
        assert line(process) == "up"
        process.send_signal(signal.SIGINT)
        assert line(process) == "warm"
        process.send_signal(signal.SIGINT)

        assert process.wait(DEADLINE_S) == 9
        assert rest(process) == [f"got {signal.SIGQUIT}"]


def test_stop_before_the_worker_can_listen_is_a_good_end() -> None:
    """A worker that dies of SIGTERM while it still imports had nothing in hand."""
    with supervised(
        "def run(arguments):\n    say('up')\n    while True: signal.pause()"
    ) as process:
        assert line(process) == "up"
        process.terminate()

        assert process.wait(DEADLINE_S) == 0


def test_stop_during_a_pause_starts_nothing() -> None:
    """A worker that waits for its restart is ended by SIGTERM at once."""
    body = """
supervisor.FIRST_PAUSE_S = supervisor.LONGEST_PAUSE_S = 600
def run(arguments): say("ran"); os._exit(1)
"""
    with supervised(body) as process:
        assert line(process) == "ran"
        assert "worker_process_exited worker=worker reason='exit code 1' restart_in_s=600" in event(
            process
        )
        process.terminate()

        assert process.wait(DEADLINE_S) == 0
        assert rest(process) == []


@pytest.mark.parametrize("platform", sorted({sys.platform, "darwin"}))
def test_killed_supervisor_leaves_nothing(platform: str) -> None:
    """kill -9 of the supervisor ends a deaf worker too; by a pipe where no kernel does it."""
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
        assert line(process) == "up"
        process.kill()

        assert rest(process) == []  # the pipe is at its end: nobody holds it any more


def test_dead_worker_leaves_no_process_of_its_group() -> None:
    """What a worker forked dies with it, also a compiler that nobody waits for."""
    body = """
def run(arguments):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN); say("forked")
        while True: time.sleep(600)
    signal.pause()
"""
    with supervised(body) as process:
        assert line(process) == "forked"
        process.terminate()

        assert process.wait(DEADLINE_S) == 0
        assert rest(process) == []


@pytest.mark.skipif(sys.platform != "linux", reason="adopts orphans as process 1 does")
def test_adopted_orphans_are_reaped() -> None:
    """As process 1 of a container it is the parent of every orphan, and leaves no zombie."""
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
    until(signal.SIGTERM, 0)
    while True: signal.pause()
"""
    with supervised(body) as process:
        orphan = line(process).split()[1]

        deadline = time.monotonic() + DEADLINE_S
        while os.path.exists(f"/proc/{orphan}"):  # noqa: PTH110 # a zombie has an entry too
            assert time.monotonic() < deadline, "The orphan is still a zombie."
            time.sleep(0.01)
        process.terminate()
        assert process.wait(DEADLINE_S) == 0


def test_one_of_two_workers_may_end_alone() -> None:
    """With --all a machine without an NPU keeps its worker on the CPU, and ends well with it."""
    body = """
def run(arguments):
    part = arguments[1]
    if part == "npu": say("npu ends"); os._exit(exit_codes.DEVICE)
    until(signal.SIGTERM, 0); say("cpu up")
    while True: signal.pause()
"""
    workers = (
        "[SupervisedProcess(run, ('--part', 'npu')), SupervisedProcess(run, ('--part', 'cpu'))]"
    )
    with supervised(body, workers) as process:
        assert {line(process), line(process)} == {"npu ends", "cpu up"}
        assert "node_ended worker=npu exit_code=6" in event(process)
        process.terminate()

        assert process.wait(DEADLINE_S) == 0


def test_it_imports_little() -> None:
    """The supervisor stays at the size of a bare Python: what it imports, it holds for ever."""
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
