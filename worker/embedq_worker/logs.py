"""Logging of a node: one line per event, on stderr, never a text or a vector."""

from __future__ import annotations

import logging
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
