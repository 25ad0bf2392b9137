"""Logging of a node: one line per event, on stderr, never a text or a vector."""

from __future__ import annotations

import logging
import os
import sys

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
