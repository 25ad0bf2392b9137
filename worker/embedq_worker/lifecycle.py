"""The life of a node's child: find the model, open the engine, prove it, serve.

Runs in Celery's `worker_process_init`, whose exceptions Celery swallows and then serves without a
model. So nothing here raises: the child writes what became of it into the node's state file, and
the parent consumes nothing until that says healthy.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from dataclasses import replace
from typing import Any

from celery import signals

from embedq.contract import Accuracy
from embedq.errors import EmbedqError
from embedq_worker import claims, logs, models, selftest
from embedq_worker.devices import verify_opened
from embedq_worker.embedder import Embedder
from embedq_worker.engines.stub import StubEngine, StubTokenizer, stub_card
from embedq_worker.errors import DeviceError, EngineError, Reason
from embedq_worker.opening import DEFAULT_TOKEN_BUDGET, Opener
from embedq_worker.placement import Placement, place
from embedq_worker.serving import Proven, Serving
from embedq_worker.settings import DeviceChoice, WorkerSettings
from embedq_worker.state import NodeState, State, StateFile

log = logging.getLogger("embedq.worker")

#: Seconds that a killed predecessor may take to give its device back.
CLAIM_PATIENCE_S = 10.0


_serving: Serving | None = None
_claim: claims.Claim | None = None


def serving() -> Serving | None:
    """Return what this child embeds with, or None if it may not serve."""
    return _serving


def find_model(settings: WorkerSettings) -> models.Model | None:
    """Find and check the model that the settings name; the stub needs none.

    Raises:
        ModelError: it is missing, damaged or of a kind we cannot build.
    """
    if settings.device is DeviceChoice.STUB:
        return None
    return models.resolve(
        settings.model,
        settings.model_revision,
        cache_dir=settings.cache_dir,
        wheel_dir=settings.wheel_dir,
        offline=settings.offline,
    )


def open_serving(settings: WorkerSettings, model: models.Model | None) -> Serving:
    """Open the engine of the device and prove it.

    Raises:
        ModelError: the files of the model are damaged.
        DeviceError: OpenVINO does not see the device.
        EngineError: the engine does not open, or fails its self-test.
    """
    if model is None:
        proven = _open_stub(settings)
        return Serving(stub_card(), proven, lambda: proven, lambda: proven)
    opener = Opener(settings, model)
    card = model.card()
    if settings.device is DeviceChoice.NPU:
        standard = opener.open_npu()
    else:
        standard = opener.open_cpu(Accuracy.STANDARD)
        card = replace(card, quantised=opener.quantised())
    return Serving(
        card, standard, lambda: opener.open_cpu(Accuracy.EXACT), lambda: opener.open_int8()
    )


def _open_stub(settings: WorkerSettings) -> Proven:
    engine = StubEngine(delay_s=settings.stub_delay_s, texts_per_s=settings.stub_texts_per_s)
    budget = settings.token_budget or DEFAULT_TOKEN_BUDGET
    embedder = Embedder(StubTokenizer(), engine, token_budget=budget)
    report = selftest.run(embedder, None)
    if not report.passed:
        raise EngineError(f"The self-test failed: {report.reason}", Reason.SELFTEST_FAILED)
    return Proven(engine, embedder, report, "only")


def claim_device(settings: WorkerSettings, placement: Placement) -> claims.Claim | None:
    """Take the NPU of a placement for this process alone.

    Raises:
        DeviceBusy: another process holds it.
    """
    if placement.npu is None:
        return None
    return claims.claim(
        placement.npu.pci, settings.lock_dir, node=settings.name, wait_s=CLAIM_PATIENCE_S
    )


def open_placed(
    settings: WorkerSettings, placement: Placement, model: models.Model | None = None
) -> Serving:
    """Open and prove the engine on the device of a placement, and on no other.

    Args:
        settings: of the node.
        placement: where.
        model: what to serve; None finds it.

    Raises:
        ModelError, EngineError: as open_serving.
        WrongDevice: the runtime opened another NPU than the one of the placement.
    """
    placed = settings.model_copy(update={"device": DeviceChoice(str(placement.device))})
    opened = open_serving(placed, model or find_model(placed))
    if opened.engine.device is not placement.device:
        opened.close()
        raise EngineError(
            f"The engine {opened.engine.name} runs on {opened.engine.device}, not on "
            f"{placement.device}."
        )
    if placement.npu is not None:
        try:
            verify_opened(placement.npu, opened.engine.details.get("device_pci_info", ""))
        except DeviceError:
            opened.close()
            raise
    return opened


@signals.worker_process_init.connect
def on_process_init(sender: Any = None, **_: Any) -> None:
    """Make this child ready to serve, or record why it is not."""
    global _serving, _claim
    from embedq_worker.app import app  # the app imports the tasks, which import this file

    settings: WorkerSettings = app.conf.embedq
    state_file = StateFile(settings.runtime_dir, settings.name)
    state = NodeState(State.STARTING, time.time(), os.getpid())
    try:
        _die_with_parent()
        # Ctrl-C in a terminal reaches the whole group; the parent decides when a child ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        state_file.write(state)
        logs.send_native_to_stderr()
        began = time.monotonic()
        placement = app.conf.get("embedq_placement") or place(settings, wait_s=CLAIM_PATIENCE_S)
        state = replace(state, home=str(placement.home))
        state_file.write(state)
        if placement.degraded and not settings.degraded_cpu:
            log.warning("degraded node=%s device=none reason=%s", settings.name, placement.reason)
            state_file.write(state.now(State.DEGRADED, placement.reason))
            return
        _claim = claim_device(settings, placement)
        _serving = open_placed(settings, placement)
    except BaseException as error:  # whatever it is, the parent must hear of it
        reason = str(error) if isinstance(error, EmbedqError) else f"{type(error).__name__}"
        log.exception("init_failed node=%s reason=%s", settings.name, reason)
        state_file.write(state.now(State.FAILED, reason))
        return
    engine = _serving.engine
    state = replace(
        state,
        device=str(engine.device),
        engine=engine.name,
        precision=str(engine.precision),
        card=_serving.card,
    )
    if placement.degraded:
        log.warning("degraded node=%s device=cpu reason=%s", settings.name, placement.reason)
    health = State.DEGRADED if placement.degraded else State.HEALTHY
    state_file.write(state.now(health, placement.reason if placement.degraded else ""))
    log.info(
        "serving node=%s model=%s identity=%s engine=%s device=%s precision=%s seconds=%.2f",
        settings.name,
        _serving.card.label,
        _serving.card.identity[:12],
        engine.name,
        engine.device,
        engine.precision,
        time.monotonic() - began,
    )


@signals.worker_process_shutdown.connect
def on_process_shutdown(**_: Any) -> None:
    """Give the device back when the child ends in good order."""
    if _serving is not None:
        _serving.close()
    if _claim is not None:
        _claim.release()


def _die_with_parent() -> None:
    """Ask Linux to kill this child when its parent dies, so that no model outlives its node."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
