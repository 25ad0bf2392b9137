"""The model and the device that a node was given, opened as what serves with them.

Every process that computes comes through here: a node's child, a probe, and the commands that warm,
check and measure. None of them needs Celery for it.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Final

from embedq.contract import Accuracy
from embedq_worker import claims, models
from embedq_worker.choices import DeviceChoice
from embedq_worker.devices import verify_opened
from embedq_worker.errors import DeviceError, EngineError
from embedq_worker.opening import Opener
from embedq_worker.placement import Placement
from embedq_worker.serving import Proven, Serving
from embedq_worker.settings import WorkerSettings
from embedq_worker.shadow import Shadow
from embedq_worker.stub_serving import serve_stub

#: Seconds that a killed predecessor may take to give its device back.
CLAIM_PATIENCE_S: Final = 10.0


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
        return serve_stub(settings)
    opener = Opener(settings, model)

    def open_exact() -> Proven:
        return opener.open_cpu(Accuracy.EXACT)

    if settings.device is DeviceChoice.NPU:
        shadow = Shadow(settings.shadow_every, opener.prover.open_reference)
        return Serving(model.card(), opener.open_npu(), open_exact, shadow=shadow)
    name = opener.quantised()
    # By the name that is announced: another copy may be made before a batch asks for it.
    open_int8 = functools.partial(opener.open_int8, name=name) if name else None
    card = replace(model.card(), quantised=name)
    return Serving(card, opener.open_cpu(Accuracy.STANDARD), open_exact, open_int8)


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
    engine = opened.standard.engine
    if engine.device is not placement.device:
        opened.close()
        raise EngineError(
            f"The engine {engine.name} runs on {engine.device}, not on {placement.device}."
        )
    if placement.npu is not None:
        try:
            verify_opened(placement.npu, engine.details.get("device_pci_info", ""))
        except DeviceError:
            opened.close()
            raise
    return opened
