"""`embedq-worker start` in the node's own process: choose the device, then be Celery's parent."""

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
from embedq_worker.device.placement import Placement, place
from embedq_worker.files import locked, private_dir
from embedq_worker.main_process import supervisor
from embedq_worker.main_process.status import StateFile
from embedq_worker.settings import DeviceChoice, Standin, WorkerSettings

log = logging.getLogger("embedq.worker")


#: Seconds that a killed predecessor may take to give its device back.
PREDECESSOR_S = 10.0


#: The same for a first start, whose predecessor was killed a moment ago.
FIRST_START_S = 1.0


#: Seconds that a Redis may take to answer before the node starts without having heard it.
KNOCK_S = 1.0


#: Why a node that the supervisor gave up on starts without its NPU.
_CRASHED = f"The node died {supervisor.CRASHES} times in {supervisor.WINDOW_S:.0f} s."


def start(settings: WorkerSettings, *, attempt: int = 0, npu_off: bool = False) -> int:
    """Run a node until it ends; return its exit code.

    Args:
        settings: of the node; the environment says the same, for the app reads it again.
        attempt: how often the supervisor has started it before.
        npu_off: the supervisor wants the NPU left alone, for the node died again and again.

    Raises:
        ModelError, DeviceError, SettingsError: it cannot run; the message says why.
    """
    process.set_up(str(settings.log_level))
    state_file = StateFile(settings.runtime_dir, settings.name)
    with ExitStack() as held:
        _take_name(settings, held, PREDECESSOR_S if attempt else FIRST_START_S)
        return _run(settings, state_file, attempt=attempt, npu_off=npu_off)


def _take_name(settings: WorkerSettings, held: ExitStack, wait_s: float) -> None:
    """Keep others of this name off the node's files: it would take their child for its own."""
    path = settings.runtime_dir / f"{settings.name}.lock"
    try:
        held.enter_context(locked(path, wait_s))
    except TimeoutError:
        raise SettingsError(
            f"A node {settings.name} runs on this machine already (lock: {path}). "
            "Stop that one, or give this one a name of its own: --name NAME."
        ) from None


def _run(settings: WorkerSettings, state_file: StateFile, *, attempt: int, npu_off: bool) -> int:
    """Choose the device, find the model, and be Celery's parent until the node ends."""
    if settings.cache_dir.exists():
        private_dir(settings.cache_dir)
    placement = place(
        settings,
        npu_off=_CRASHED if npu_off else "",
        wait_s=PREDECESSOR_S if attempt else 0.0,
    )
    if npu_off and not placement.degraded:
        log.error("node_ends node=%s reason=it died again and again", settings.name)
        return exit_codes.CRASH_LOOP
    log.info(
        "device_chosen node=%s device=%s home=%s reason=%s",
        settings.name,
        placement.device,
        placement.home,
        placement.reason,
    )
    # Looked up here as well as in the child, so that a wrong model ends the command with a sentence
    # instead of a node that never serves. The checksums are cached, so it costs once.
    from embedq_worker.model.resolve import find_model

    find_model(settings)
    state_file.remove()
    code = _run_celery(settings, placement)
    if code == exit_codes.ENGINE and settings.strict:
        log.error(
            "npu_unproven node=%s reason=EMBEDQ_STRICT keeps this node off the CPU", settings.name
        )
        return exit_codes.NPU_UNPROVEN
    return code


def take_part(part: str) -> None:
    """Make the environment that of one of the two nodes of `start --all`.

    Raises:
        SettingsError: the settings speak of one node only.
    """
    asked = os.environ.get("EMBEDQ_DEVICE", DeviceChoice.AUTO)
    if asked != DeviceChoice.AUTO:
        raise SettingsError(
            f"--all and EMBEDQ_DEVICE={asked} exclude each other: --all starts a node on the NPU "
            "and one on the CPU. Drop one of the two."
        )
    rehearsed = os.environ.get("EMBEDQ_NPU_STANDIN", Standin.NONE) != Standin.NONE
    if part == Device.CPU:
        os.environ.pop("EMBEDQ_NPU_STANDIN", None)
    os.environ["EMBEDQ_DEVICE"] = part
    whole = WorkerSettings.load()
    if whole.strict:
        raise SettingsError(
            "--all and EMBEDQ_STRICT exclude each other: a strict node computes on its NPU alone, "
            "and --all adds one on the CPU. Use --device npu."
        )
    if named := os.environ.get("EMBEDQ_NAME"):
        os.environ["EMBEDQ_NAME"] = f"{named}-{part}"
    # The node on the CPU serves what a degraded NPU leaves.
    os.environ.setdefault("EMBEDQ_DEGRADED_CPU", "0")
    npu_visible = rehearsed or bool(discover().visible)
    os.environ["EMBEDQ_THREADS"] = str(share_cores(whole.cores(), part, npu_visible=npu_visible))


def share_cores(cores: int, part: str, *, npu_visible: bool) -> int:
    """Return the cores of one of two nodes: a quarter to feed the NPU, the others to compute."""
    to_npu = max(1, cores // 4)
    if part == Device.NPU:
        return to_npu
    return max(1, cores - to_npu) if npu_visible else cores


def _knock(settings: WorkerSettings) -> None:
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


def _heed(settings: WorkerSettings, placement: Placement) -> Placement:
    """Keep off an NPU that an operator has taken away; a Redis that is away is asked again later.

    Its first child is forked before the step that hears operators, and would open the NPU.
    """
    # Not needed to refuse a start for another reason.
    from redis.exceptions import RedisError

    from embedq.store.connection import open_redis
    from embedq.store.fleet import Wanted, fetch_orders

    if placement.home is not Device.NPU:
        return placement
    try:
        with open_redis(
            settings.results_url, connect_timeout_s=KNOCK_S, timeout_s=KNOCK_S
        ) as redis:
            order, _ = fetch_orders(redis, settings.name)
    except RedisError:
        return placement
    if order is None or order.wanted is not Wanted.DEGRADED:
        return placement
    return Placement(Device.CPU, Device.NPU, order.reason)


def _run_celery(settings: WorkerSettings, placement: Placement) -> int:
    """Run the Celery worker that `celery --app embedq_worker.main_process.app worker` runs."""
    _knock(settings)
    from embedq_worker.main_process.app import app  # Celery, not needed to refuse a start

    app.conf.embedq_placement = _heed(settings, placement)
    worker = app.Worker(
        hostname=f"{settings.name}@{socket.gethostname()}",
        loglevel=str(settings.log_level).upper(),
        quiet=True,
        # Gossip and mingle only add chatter on Redis; nodes here need not know each other.
        without_gossip=True,
        without_mingle=True,
    )
    # Not app.worker_main(), which forgets the exit status, so that nothing would restart a node.
    worker.start()
    return worker.exitcode or exit_codes.OK
