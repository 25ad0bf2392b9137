"""`embedq-worker start` below the supervisor: choose the device, then run Celery's main process."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import ExitStack
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from embedq_worker.model.resolve import Model

log = logging.getLogger(__name__)

#: Time to wait for the locks of the worker that ran before, seconds: after a restart by the
#: supervisor, and on a first start, where an operator may have killed it a moment ago.
RESTART_WAIT_S, FIRST_START_WAIT_S = 10.0, 1.0

#: Timeout of a request to Redis at start, seconds; the worker starts without its answer.
REDIS_TIMEOUT_S = 1.0

_CRASHED = f"The worker died {supervisor.CRASHES} times in {supervisor.WINDOW_S:.0f} s."


def start(settings: WorkerSettings, *, attempt: int = 0, npu_off: bool = False) -> int:
    """Run a worker until it ends; return its exit code.

    Args:
        settings: of the worker; the app reads the same values from the environment.
        attempt: how often the supervisor has restarted it.
        npu_off: do not use the NPU, as the worker has crashed repeatedly.

    Raises:
        ModelError, DeviceError, SettingsError: it cannot run.
    """
    process.set_up(str(settings.log_level))
    status_file = StatusFile(settings.runtime_dir, settings.name)
    with ExitStack() as held:
        lock_name(settings, held, RESTART_WAIT_S if attempt else FIRST_START_WAIT_S)
        return _run(settings, status_file, attempt=attempt, npu_off=npu_off)


def lock_name(settings: WorkerSettings, held: ExitStack, wait_s: float) -> None:
    """Lock the worker's name, as two workers of one name would share a status file.

    Raises:
        SettingsError: a worker of this name runs on this machine.
    """
    path = settings.runtime_dir / f"{settings.name}.lock"
    try:
        held.enter_context(locked(path, wait_s))
    except TimeoutError:
        raise SettingsError(
            f"A worker {settings.name} already runs on this machine (lock: {path}). "
            "Stop it, or name this one differently: --name NAME."
        ) from None


def _run(settings: WorkerSettings, status_file: StatusFile, *, attempt: int, npu_off: bool) -> int:
    if settings.cache_dir.exists():
        private_dir(settings.cache_dir)
    placement = choose_placement(
        settings,
        npu_disabled_reason=_CRASHED if npu_off else "",
        wait_s=RESTART_WAIT_S if attempt else 0.0,
    )
    if npu_off and not placement.degraded:
        log.error("worker_shutdown worker=%s reason=it crashed repeatedly", settings.name)
        return exit_codes.CRASH_LOOP
    log.info(
        "device_chosen worker=%s device=%s assigned_device=%s reason=%s",
        settings.name,
        placement.device,
        placement.assigned_device,
        placement.reason,
    )
    # The pool process finds the model again. Finding it here first ends the command with an error
    # instead of a worker that never serves; checksums are cached, so this costs nothing later.
    from embedq_worker.model.resolve import find_model

    _log_model(find_model(settings, placement.assigned_device))
    status_file.remove()
    code = _run_celery(settings, placement)
    if code == exit_codes.ENGINE and settings.strict:
        log.error(
            "npu_unverified worker=%s reason=EMBEDQ_STRICT keeps this worker off the CPU",
            settings.name,
        )
        return exit_codes.NPU_UNVERIFIED
    return code


def _log_model(model: Model | None) -> None:
    if model is None:
        return
    log.info(
        "model_found model=%s identity=%s rows=%s %s",
        model.label,
        model.identity[:12],
        "shared" if model.packable else "single",
        model.summary(),
    )
    if model.max_length < model.longest and model.choices.length_cap:
        log.warning(
            "max_length_capped max_length=%d model_supports=%d reason=long rows compile slowly "
            "on an NPU; set EMBEDQ_MAX_LENGTH, with the same value on all workers of this model",
            model.max_length,
            model.longest,
        )


def configure_part(part: str) -> None:
    """Set the environment variables of one of the two workers of `start --all`.

    Raises:
        SettingsError: the settings fit a single worker only.
    """
    asked = os.environ.get("EMBEDQ_DEVICE", DeviceChoice.AUTO)
    if asked != DeviceChoice.AUTO:
        raise SettingsError(
            f"--all and EMBEDQ_DEVICE={asked} exclude each other: --all starts a worker on the NPU "
            "and one on the CPU. Remove one of the two."
        )
    emulated = os.environ.get("EMBEDQ_NPU_EMULATION", Emulation.NONE) != Emulation.NONE
    if part == Device.CPU:
        os.environ.pop("EMBEDQ_NPU_EMULATION", None)
    os.environ["EMBEDQ_DEVICE"] = part
    whole = WorkerSettings.load()
    if whole.strict:
        raise SettingsError(
            "--all and EMBEDQ_STRICT exclude each other: a strict worker computes on its NPU "
            "only, and --all adds a worker on the CPU. Use --device npu."
        )
    if named := os.environ.get("EMBEDQ_NAME"):
        os.environ["EMBEDQ_NAME"] = f"{named}-{part}"
    # While the NPU is degraded, the CPU worker serves its queue.
    os.environ.setdefault("EMBEDQ_CPU_FALLBACK", "0")
    npu_visible = emulated or bool(discover().visible)
    os.environ["EMBEDQ_THREADS"] = str(share_cores(whole.cores(), part, npu_visible=npu_visible))


def share_cores(cores: int, part: str, *, npu_visible: bool) -> int:
    """Return the cores of one of two workers: a quarter feeds the NPU, the others compute."""
    to_npu = max(1, cores // 4)
    if part == Device.NPU:
        return to_npu
    return max(1, cores - to_npu) if npu_visible else cores


def check_redis(settings: WorkerSettings) -> None:
    """Check both Redis URLs and their passwords; a Redis that does not answer is accepted.

    Raises:
        SettingsError: a URL is invalid or its password is wrong.
    """
    # Imported here: a start that is refused for another reason does without.
    from redis.exceptions import AuthenticationError, RedisError

    from embedq.store.connection import open_redis

    for variable in ("broker_url", "results_url"):
        url = getattr(settings, variable)
        with open_redis(url, connect_timeout_s=REDIS_TIMEOUT_S, timeout_s=REDIS_TIMEOUT_S) as redis:
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
    """Place the worker on its CPU if an operator has disabled the NPU.

    The first pool process is forked before ControlStep runs and would open the NPU. Without an
    answer from Redis the placement is unchanged.
    """
    # Imported here: a start that is refused for another reason does without.
    from redis.exceptions import RedisError

    from embedq.store.connection import open_redis
    from embedq.store.fleet import DesiredState, fetch_commands

    if placement.assigned_device is not Device.NPU:
        return placement
    try:
        with open_redis(
            settings.results_url, connect_timeout_s=REDIS_TIMEOUT_S, timeout_s=REDIS_TIMEOUT_S
        ) as redis:
            command, _ = fetch_commands(redis, settings.name)
    except RedisError:
        return placement
    if command is None or command.desired is not DesiredState.DEGRADED:
        return placement
    return Placement(Device.CPU, Device.NPU, command.reason)


def _run_celery(settings: WorkerSettings, placement: Placement) -> int:
    """Run what `celery --app embedq_worker.main_process.app worker` runs."""
    check_redis(settings)
    from embedq_worker.main_process.app import app  # imports Celery
    from embedq_worker.main_process.controller import WorkerContext, WorkerController

    placement = apply_operator_command(settings, placement)
    app.conf.embedq = WorkerContext(settings, WorkerController(settings, placement))
    worker = app.Worker(
        hostname=f"{settings.name}@{socket.gethostname()}",
        loglevel=str(settings.log_level).upper(),
        quiet=True,
        # Gossip and mingle add traffic on Redis; workers here need not know each other.
        without_gossip=True,
        without_mingle=True,
    )
    # app.worker_main() loses the exit code, by which the supervisor decides on a restart.
    worker.start()
    return worker.exitcode or exit_codes.OK
