"""Logging, parent-death signal and watchdog of the processes of a worker."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Loggers limited to warnings: the worker's own log has these events.
_QUIET = (
    "celery.app.trace",
    "celery.worker.strategy",
    "celery.pool",
    "kombu",
    "amqp",
    "onnxruntime",
)


def set_up(level: str) -> None:
    """Write the log of this process to stderr, one line per event.

    Args:
        level: lowest level that is written, as in EMBEDQ_LOG_LEVEL.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(process)d %(message)s",
        force=True,
    )
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def send_native_to_stderr() -> None:
    """Redirect descriptor 1 to stderr, but not Python's stdout.

    Runtimes such as OpenVINO log to descriptor 1, where results belong.
    Nothing happens if Python's stdout is not descriptor 1.
    """
    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, ValueError, AttributeError):
        return
    sys.stdout.flush()
    results = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors="replace")
    os.dup2(2, 1)
    sys.stdout = results


#: Option of prctl(2) that sets the signal sent when the thread that forked this process ends.
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Let Linux kill this process when its parent dies; otherwise it would hold the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


#: Descriptor for the traceback, as sys.stderr may be replaced.
STDERR: Final = 2


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Print a traceback and exit the process if the body takes longer.

    The timer is a C thread: a call that hangs in a driver may hold the interpreter lock.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
