"""`embedq-worker start` in the worker's own process: choose the device, then be Celery's parent."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack

from embedq.errors import SettingsError
from embedq.protocol.contract import Device
from embedq.settings import mask_password
from embedq_worker import exit_codes, process
from embedq_worker.device.discovery import discover
from embedq_worker.device.placement import Placement, choose_placement
from embedq_worker.files import locked, private_dir
from embedq_worker.main_process import supervisor
from embedq_worker.main_process.status import StatusFile
from embedq_worker.settings import DeviceChoice, Emulation, WorkerSettings

log = logging.getLogger(__name__)


#: Seconds that a killed predecessor may take to give its device back.
PREDECESSOR_S = 10.0


#: The same for a first start, whose predecessor was killed a moment ago.
FIRST_START_S = 1.0


#: Seconds that a Redis may take to answer before the worker starts without having heard it.
KNOCK_S = 1.0


#: Why a worker that the supervisor gave up on starts without its NPU.
_CRASHED = f"The worker died {supervisor.CRASHES} times in {supervisor.WINDOW_S:.0f} s."


def start(settings: WorkerSettings, *, attempt: int = 0, npu_disabled_reason: bool = False) -> int:
    """Run a worker until it ends; return its exit code.

    Args:
        settings: of the worker; the environment says the same, for the app reads it again.
        attempt: how often the supervisor has started it before.
        npu_off: the supervisor wants the NPU left alone, for the worker died again and again.

    Raises:
        ModelError, DeviceError, SettingsError: it cannot run; the message says why.
    """
    process.set_up(str(settings.log_level))
    state_file = StatusFile(settings.runtime_dir, settings.name)
    with ExitStack() as held:
        lock_name(settings, held, PREDECESSOR_S if attempt else FIRST_START_S)
        return _run(settings, state_file, attempt=attempt, npu_disabled_reason=npu_disabled_reason)


def lock_name(settings: WorkerSettings, held: ExitStack, wait_s: float) -> None:
    """Keep others of this name off the worker's files: it would take their child for its own."""
    path = settings.runtime_dir / f"{settings.name}.lock"
    try:
        held.enter_context(locked(path, wait_s))
    except TimeoutError:
        raise SettingsError(
            f"A worker {settings.name} runs on this machine already (lock: {path}). "
            "Stop that one, or give this one a name of its own: --name NAME."
        ) from None


def _run(
    settings: WorkerSettings, state_file: StatusFile, *, attempt: int, npu_disabled_reason: bool
) -> int:
    """Choose the device, find the model, and be Celery's parent until the worker ends."""
    if settings.cache_dir.exists():
        private_dir(settings.cache_dir)
    placement = choose_placement(
        settings,
        npu_disabled_reason=_CRASHED if npu_disabled_reason else "",
        wait_s=PREDECESSOR_S if attempt else 0.0,
    )
    if npu_disabled_reason and not placement.degraded:
        log.error("worker_shutdown worker=%s reason=it died again and again", settings.name)
        return exit_codes.CRASH_LOOP
    log.info(
        "device_chosen worker=%s device=%s home=%s reason=%s",
        settings.name,
        placement.device,
        placement.assigned_device,
        placement.reason,
    )
    # Looked up here as well as in the child, so that a wrong model ends the command with a sentence
    # instead of a worker that never serves. The checksums are cached, so it costs once.
    from embedq_worker.model.resolve import find_model

    find_model(settings)
    state_file.remove()
    code = _run_celery(settings, placement)
    if code == exit_codes.ENGINE and settings.strict:
        log.error(
            "npu_unproven worker=%s reason=EMBEDQ_STRICT keeps this worker off the CPU",
            settings.name,
        )
        return exit_codes.NPU_UNPROVEN
    return code


def configure_part(part: str) -> None:
    """Make the environment that of one of the two workers of `start --all`.

    Raises:
        SettingsError: the settings speak of one worker only.
    """
    asked = os.environ.get("EMBEDQ_DEVICE", DeviceChoice.AUTO)
    if asked != DeviceChoice.AUTO:
        raise SettingsError(
            f"--all and EMBEDQ_DEVICE={asked} exclude each other: --all starts a worker on the NPU "
            "and one on the CPU. Drop one of the two."
        )
    rehearsed = os.environ.get("EMBEDQ_NPU_EMULATION", Emulation.NONE) != Emulation.NONE
    if part == Device.CPU:
        os.environ.pop("EMBEDQ_NPU_EMULATION", None)
    os.environ["EMBEDQ_DEVICE"] = part
    whole = WorkerSettings.load()
    if whole.strict:
        raise SettingsError(
            "--all and EMBEDQ_STRICT exclude each other: a strict worker computes on its NPU "
            "alone, "
            "and --all adds one on the CPU. Use --device npu."
        )
    if named := os.environ.get("EMBEDQ_NAME"):
        os.environ["EMBEDQ_NAME"] = f"{named}-{part}"
    # The worker on the CPU serves what a degraded NPU leaves.
    os.environ.setdefault("EMBEDQ_CPU_FALLBACK", "0")
    npu_visible = rehearsed or bool(discover().visible)
    os.environ["EMBEDQ_THREADS"] = str(share_cores(whole.cores(), part, npu_visible=npu_visible))


def share_cores(cores: int, part: str, *, npu_visible: bool) -> int:
    """Return the cores of one of two workers: a quarter to feed the NPU, the others to compute."""
    to_npu = max(1, cores // 4)
    if part == Device.NPU:
        return to_npu
    return max(1, cores - to_npu) if npu_visible else cores


def check_redis(settings: WorkerSettings) -> None:
    """Refuse a URL that is none, and a password that is wrong; one that is away may come.

    Raises:
        SettingsError: trying again would end the same way.
    """
    # Not needed to refuse a start for another reason.
    from redis.exceptions import AuthenticationError, RedisError

    from embedq.store.connection import open_redis

    for variable in ("broker_url", "results_url"):
        url = getattr(settings, variable)
        with open_redis(url, connect_timeout_s=KNOCK_S, timeout_s=KNOCK_S) as redis:
            try:
                redis.ping()
            except AuthenticationError:
                raise SettingsError(
                    f"EMBEDQ_{variable.upper()}: Redis at {mask_password(url)} refused the "
                    "password or user. Check the URL."
                ) from None
            except RedisError:
                continue


def apply_operator_command(settings: WorkerSettings, placement: Placement) -> Placement:
    """Keep off an NPU that an operator has taken away; a Redis that is away is asked again later.

    Its first child is forked before the step that hears operators, and would open the NPU.
    """
    # Not needed to refuse a start for another reason.
    from redis.exceptions import RedisError

    from embedq.store.connection import open_redis
    from embedq.store.fleet import DesiredState, fetch_commands

    if placement.assigned_device is not Device.NPU:
        return placement
    try:
        with open_redis(
            settings.results_url, connect_timeout_s=KNOCK_S, timeout_s=KNOCK_S
        ) as redis:
            order, _ = fetch_commands(redis, settings.name)
    except RedisError:
        return placement
    if order is None or order.desired is not DesiredState.DEGRADED:
        return placement
    return Placement(Device.CPU, Device.NPU, order.reason)


def _run_celery(settings: WorkerSettings, placement: Placement) -> int:
    """Run the Celery worker that `celery --app embedq_worker.main_process.app worker` runs."""
    check_redis(settings)
    from embedq_worker.main_process.app import app  # Celery, not needed to refuse a start

    app.conf.embedq_placement = apply_operator_command(settings, placement)
    worker = app.Worker(
        hostname=f"{settings.name}@{socket.gethostname()}",
        loglevel=str(settings.log_level).upper(),
        quiet=True,
        # Gossip and mingle only add chatter on Redis; workers here need not know each other.
        without_gossip=True,
        without_mingle=True,
    )
    # Not app.worker_main(), which forgets the exit status, so that nothing would restart a worker.
    worker.start()
    return worker.exitcode or exit_codes.OK
