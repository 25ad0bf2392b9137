"""The life of a node's child: find the model, open the engine, prove it, serve.

Runs in Celery's `worker_process_init`, whose exceptions Celery swallows and then serves without a
model. So nothing here raises: the child writes what became of it into the node's state file, and
the parent consumes nothing until that says healthy.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from typing import Any

from celery import signals

from embedq.errors import EmbedqError
from embedq_worker import claims, logs
from embedq_worker.child import Child
from embedq_worker.orphans import die_with_parent
from embedq_worker.placed_serving import CLAIM_PATIENCE_S, claim_device, open_placed
from embedq_worker.placement import place
from embedq_worker.settings import WorkerSettings

log = logging.getLogger("embedq.worker")

#: Seconds for which one Python thread may keep the others from running. With the default of 5 ms a
#: thread that hands the device its next work waits longer for its turn than the device computes.
SWITCH_INTERVAL_S = 0.0005
#: Seconds that a child waits whose predecessor died before it was ready: long enough for the parent
#: to see each of them, so that a loop ends after about as many as it should; 13 were seen for 5.
EARLY_DEATH_PAUSE_S = 0.5

_child: Child | None = None
_claim: claims.Claim | None = None


def child() -> Child:
    """Return what this process says of itself.

    Raises:
        RuntimeError: it is no child of a node.
    """
    if _child is None:
        raise RuntimeError("A batch outside a node's child. This is a bug.")
    return _child


@signals.worker_process_init.connect
def on_process_init(sender: Any = None, **_: Any) -> None:
    """Make this child ready to serve, or record why it is not."""
    global _child, _claim
    from embedq_worker.app import app  # the app imports the tasks, which import this file

    settings: WorkerSettings = app.conf.embedq
    _child = Child(settings, app.conf.get("embedq_pace_s", 0.0))
    try:
        die_with_parent()
        # Ctrl-C in a terminal reaches the whole group; the parent decides when a child ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        logs.send_native_to_stderr()
        if _child.follows_early_death:
            time.sleep(EARLY_DEATH_PAUSE_S)
        began = time.monotonic()
        placement = app.conf.get("embedq_placement") or place(settings, wait_s=CLAIM_PATIENCE_S)
        _child.placed(placement)
        if placement.degraded and (settings.strict or not settings.degraded_cpu):
            log.warning("degraded node=%s device=none reason=%s", settings.name, placement.reason)
            _child.idles(placement.reason)
            _child.tell_until_heard()
            return
        _claim = claim_device(settings, placement)
        opened = open_placed(settings, placement)
    except BaseException as error:  # whatever it is, the parent must hear of it
        reason = str(error) if isinstance(error, EmbedqError) else type(error).__name__
        log.exception("init_failed node=%s reason=%s", settings.name, reason)
        _child.failed(error)
        _child.tell_until_heard()
        return
    if placement.degraded:
        log.warning("degraded node=%s device=cpu reason=%s", settings.name, placement.reason)
    _child.serves(opened, placement)
    _child.tell_until_heard()
    engine = opened.standard.engine
    log.info(
        "serving node=%s model=%s identity=%s engine=%s device=%s precision=%s seconds=%.2f",
        settings.name,
        opened.card.label,
        opened.card.identity[:12],
        engine.name,
        engine.device,
        engine.precision,
        time.monotonic() - began,
    )


@signals.worker_process_shutdown.connect
def on_process_shutdown(**_: Any) -> None:
    """Give the device back when the child ends in good order."""
    if _child is not None:
        _child.close()
    if _claim is not None:
        _claim.release()
