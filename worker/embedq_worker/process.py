"""Logging, parent-death signal and watchdog of a process.

Logging of a worker: one line per event, on stderr, never a text or a vector.

No process of a worker outlives the one that started it: a model or a device would go with it.

An end to engine calls that never return.

A call that hangs inside a driver cannot be interrupted from Python, and may hold the interpreter's
lock while it hangs. So the guard is a C thread of the interpreter, which ends the process; the
parent replaces it and the batch comes back.
"""

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

#: Chatty loggers whose events ours already tell in one line.
_QUIET = (
    "celery.app.trace",
    "celery.worker.strategy",
    "celery.pool",
    "kombu",
    "amqp",
    "onnxruntime",
)


def set_up(level: str) -> None:
    """Send every record of this process and its children to stderr."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(process)d %(message)s",
        force=True,
    )
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def send_native_to_stderr() -> None:
    """Keep what a runtime writes to descriptor 1, as OpenVINO logs, out of our results.

    Python's own stdout stays where it was. Where it is not descriptor 1, somebody has taken care.
    """
    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, ValueError, AttributeError):
        return
    sys.stdout.flush()
    ours = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors="replace")
    os.dup2(2, 1)
    sys.stdout = ours


#: prctl(2): choose the signal that a process gets when the thread that forked it ends.
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))


#: Where the traceback goes: the process' own standard error, whatever Python made of sys.stderr.
STDERR: Final = 2


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process if the body takes longer; what hung is printed as a traceback of code."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
