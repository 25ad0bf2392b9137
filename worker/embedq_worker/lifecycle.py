"""The life of a node's child: find the model, open the engine, prove it, serve.

Runs in Celery's `worker_process_init`, whose exceptions Celery swallows and then serves without a
model. So nothing here raises: the child writes what became of it into the node's state file, and
the parent consumes nothing until that says healthy.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import time
from pathlib import Path
from typing import Any

from celery import signals

from embedq.contract import Accuracy, Device
from embedq.errors import EmbedqError
from embedq.testing import stub_vectors
from embedq_worker import claims, logs, models, selftest
from embedq_worker.child import Child
from embedq_worker.devices import verify_opened
from embedq_worker.embedder import Embedder
from embedq_worker.engines.script import FaultScript
from embedq_worker.engines.stub import STUB_MAX_LENGTH, StubEngine, StubTokenizer, stub_card
from embedq_worker.errors import DeviceError, EngineError, Reason
from embedq_worker.golden import GOLDEN
from embedq_worker.opening import DEFAULT_TOKEN_BUDGET, Opener
from embedq_worker.placement import Placement, place
from embedq_worker.serving import Proven, Serving
from embedq_worker.settings import DeviceChoice, WorkerSettings
from embedq_worker.shadow import Shadow
from embedq_worker.tokens import AnyTokenizer

log = logging.getLogger("embedq.worker")

#: Seconds that a killed predecessor may take to give its device back.
CLAIM_PATIENCE_S = 10.0
#: Seconds for which one Python thread may keep the others from running. With the default of 5 ms a
#: thread that hands the device its next work waits longer for its turn than the device computes.
SWITCH_INTERVAL_S = 0.0005


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
        return _serve_stub(settings)
    opener = Opener(settings, model)

    def open_exact() -> Proven:
        return opener.open_cpu(Accuracy.EXACT)

    if settings.device is DeviceChoice.NPU:
        shadow = Shadow(settings.shadow_every, opener.open_reference)
        return Serving(model.card(), opener.open_npu(), open_exact, shadow)
    return Serving(model.card(), opener.open_cpu(Accuracy.STANDARD), open_exact)


def _serve_stub(settings: WorkerSettings) -> Serving:
    """Serve with the stub; on the CPU, where a degraded one goes, it has no faults."""
    card = stub_card(settings.stub_tokenizer.read_bytes() if settings.stub_tokenizer else b"")
    if settings.device is DeviceChoice.CPU:
        sound = _open_stub(settings, Device.CPU)
        return Serving(card, sound, lambda: sound)
    script = FaultScript(settings.stub_faults) if settings.stub_faults else None
    proven = _open_stub(settings, Device.STUB, script)
    quick = settings.model_copy(update={"stub_delay_s": 0.0, "stub_texts_per_s": 0.0})
    shadow = Shadow(settings.shadow_every, lambda: _open_stub(quick, Device.CPU))
    return Serving(card, proven, lambda: proven, shadow)


def _open_stub(
    settings: WorkerSettings, device: Device, script: FaultScript | None = None
) -> Proven:
    engine = StubEngine(
        delay_s=settings.stub_delay_s,
        texts_per_s=settings.stub_texts_per_s,
        script=script,
        device=device,
    )
    budget = settings.token_budget or DEFAULT_TOKEN_BUDGET
    embedder = Embedder(_stub_tokenizer(settings.stub_tokenizer), engine, token_budget=budget)
    # With another tokenizer than its own the stub answers otherwise.
    reference = None if settings.stub_tokenizer else stub_vectors(GOLDEN)
    report = selftest.run(embedder, None, reference)
    if not report.passed:
        raise EngineError(f"The self-test failed: {report.reason}", Reason.SELFTEST_FAILED)
    return Proven(engine, embedder, report, "only")


def _stub_tokenizer(path: Path | None) -> AnyTokenizer:
    if path is None:
        return StubTokenizer()
    from embedq_worker.tokenization import Tokenizer  # a library that the stub alone does not need

    return Tokenizer(path, STUB_MAX_LENGTH)


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
    opened = open_serving(placed, model or find_model(settings))
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
        began = time.monotonic()
        placement = app.conf.get("embedq_placement") or place(settings, wait_s=CLAIM_PATIENCE_S)
        _child.placed(placement)
        if placement.degraded and (settings.strict or not settings.degraded_cpu):
            log.warning("degraded node=%s device=none reason=%s", settings.name, placement.reason)
            _child.idles(placement.reason)
            return
        _claim = claim_device(settings, placement)
        opened = open_placed(settings, placement)
    except BaseException as error:  # whatever it is, the parent must hear of it
        reason = str(error) if isinstance(error, EmbedqError) else type(error).__name__
        log.exception("init_failed node=%s reason=%s", settings.name, reason)
        _child.failed(error)
        return
    if placement.degraded:
        log.warning("degraded node=%s device=cpu reason=%s", settings.name, placement.reason)
    _child.serves(opened, placement)
    engine = opened.engine
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


def die_with_parent() -> None:
    """Ask Linux to kill this child when its parent dies, so that no model outlives its node."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
