"""Checks of `embedq-worker check`: Redis, folders, NPU, model and engine, each with a next step."""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from redis.exceptions import ResponseError

from embedq.errors import EmbedqError
from embedq.protocol.contract import Device
from embedq.store.connection import RedisConnection
from embedq_worker.cli import check_npu
from embedq_worker.device.placement import choose_placement
from embedq_worker.engines.model_cache import QuantizedModelStore
from embedq_worker.errors import DeviceError
from embedq_worker.files import private_dir
from embedq_worker.inference.opener import EngineOpener, open_once
from embedq_worker.inference.serving import EngineSet
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import WorkerSettings

#: Packages whose versions are shown.
PACKAGES: Final = ("embedq", "celery", "kombu", "redis", "onnxruntime", "openvino", "tokenizers")
#: Free bytes of the cache folder below which a check warns, and below which it fails.
LITTLE_SPACE, NO_SPACE = 1_000_000_000, 200_000_000
#: Next steps for errors whose message has none, by the name of the check.
_NEXT_STEPS: Final = {
    "broker": "Start that Redis, or set EMBEDQ_BROKER_URL.",
    "results": "Start that Redis, or set EMBEDQ_RESULTS_URL.",
    "engine": "Read the lines above. --device cpu works without an NPU, and "
    "EMBEDQ_ENGINE=onnxruntime without OpenVINO.",
}
_ANY_STEP: Final = "Compare the settings: embedq-worker settings"


class Level(StrEnum):
    """Result of a check."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(NamedTuple):
    """One line of the output.

    Attributes:
        name: what was checked.
        level: ok; warn: unfit for production; fail: cannot work.
        detail: what was found.
        seconds: duration of the check.
        fix: next step; empty if none is needed.
    """

    name: str
    level: Level
    detail: str
    seconds: float
    fix: str = ""


#: Detail, level and fix of a check.
Finding = tuple[str, Level, str]


def run(settings: WorkerSettings) -> Iterator[Check]:
    """Run all checks and yield each as soon as it is done, in the order of dependence."""
    yield _check("versions", lambda: (_versions(), Level.OK, ""))
    yield _check("broker", lambda: _redis(settings.broker_url))
    yield _check("results", lambda: _redis(settings.results_url))
    yield _check("folders", lambda: _folders(settings))
    yield _check("disk", lambda: _disk(settings.cache_dir))
    yield from _npu(settings)
    found: list[Model | None] = []

    def model() -> Finding:
        found.append(find_model(settings, _assigned_device(settings)))
        return _describe(found[0]), Level.OK, ""

    yield _check("model", model)
    if found:
        yield from _engine(settings, found[0])


def _check(name: str, function: Callable[[], Finding]) -> Check:
    began = time.monotonic()
    try:
        detail, level, fix = function()
    except EmbedqError as error:
        detail, fix = check_npu.split_fix(error)
        level, fix = Level.FAIL, fix or _NEXT_STEPS.get(name, _ANY_STEP)
    return Check(name, level, detail, time.monotonic() - began, fix)


def _redis(url: str) -> Finding:
    redis = RedisConnection.open(url, connect_timeout_s=2, timeout_s=2)
    client = redis.client

    def fetch() -> tuple[dict[str, Any], dict[str, str]]:
        info = client.info()
        try:
            config = cast(dict[str, str], client.config_get("maxmemory-policy", "appendonly"))
        except ResponseError:  # a managed Redis may refuse CONFIG
            config = {}
        return info, config

    info, config = redis.call(fetch)
    client.close()
    limit = int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy") or config.get("maxmemory-policy", "unknown")
    detail = (
        f"Redis {info.get('redis_version', 'unknown')} at {redis.address}, {policy}, "
        f"AOF {'on' if info.get('aof_enabled') else 'off'}, "
        f"{int(info.get('used_memory', 0)) / 1e6:,.0f} of "
        f"{f'{limit / 1e6:,.0f}' if limit else 'unlimited'} MB used"
    )
    if policy not in ("noeviction", "unknown"):
        fix = "Redis may evict batches. Run: CONFIG SET maxmemory-policy noeviction"
        return detail, Level.FAIL, fix
    if not info.get("aof_enabled"):
        fix = "A restart of Redis loses queued batches. Run: CONFIG SET appendonly yes"
        return detail, Level.WARN, fix
    if not limit:
        fix = "Redis may use all memory of its host. Run: CONFIG SET maxmemory 2gb"
        return detail, Level.WARN, fix
    return detail, Level.OK, ""


def _npu(settings: WorkerSettings) -> Iterator[Check]:
    bad = Level.FAIL if check_npu.wants_npu(settings) else Level.WARN
    began = time.monotonic()
    for line in check_npu.lines(settings):
        level = Level.OK if line.ok else bad
        yield Check(line.name, level, line.detail, time.monotonic() - began, line.fix)
        began = time.monotonic()


def _folders(settings: WorkerSettings) -> Finding:
    private = [private_dir(folder) for folder in (settings.runtime_dir, settings.cache_dir)]
    return " and ".join(map(str, private)), Level.OK, ""


def _engine(settings: WorkerSettings, model: Model | None) -> Iterator[Check]:
    opened: list[EngineSet] = []

    def engine() -> Finding:
        engines, placement = open_once(settings, model)
        opened.append(engines)
        used = engines.standard.engine
        shown = f"{used.name} on {used.device}, {used.precision}"
        return f"{shown}. {placement.reason}", Level.OK, ""

    yield _check("engine", engine)
    for engines in opened:
        yield from _runtime(settings, engines)
        report = engines.standard.report
        figures = (
            f"{report.reason} Largest deviation {report.max_deviation:.1e}, "
            f"smallest cosine {report.min_cosine:.6f}, {report.inversions} inversions"
        )
        yield Check("self-test", Level.OK, figures, report.seconds)
        if model is not None and engines.model_info.quantized:
            yield _check("int8", lambda: _int8(settings, model))


def _int8(settings: WorkerSettings, model: Model) -> Finding:
    stored = QuantizedModelStore(settings.cache_dir, model).describe()
    opened = EngineOpener(settings, model).open_int8()
    opened.close()
    return f"{stored}; self-test smallest cosine {opened.report.min_cosine:.4f}", Level.OK, ""


def _runtime(settings: WorkerSettings, engines: EngineSet) -> Iterator[Check]:
    standard = engines.standard
    details = {**standard.engine.details, "chosen": standard.why}
    if standard.cpu_config is not None:
        details["cpu"] = standard.cpu_config.describe()
    ignored = details.pop("ignored", "")
    shown = ", ".join(f"{name} {value}" for name, value in details.items())
    yield Check("runtime", Level.OK, shown, 0.0)
    # A warning only: this driver has just passed the self-test.
    for line in check_npu.driver_age(details.get("npu_driver_version", "")):
        yield Check(line.name, Level.OK if line.ok else Level.WARN, line.detail, 0.0, line.fix)
    requested = [*settings.npu_properties]
    requested += ["NPU_COMMANDLIST_MODE"] if settings.npu_commandlist_mode else []
    unknown = [word for word in ignored.split() if word.partition("=")[0] in requested]
    if unknown:
        fix = "The NPU plugin does not know these properties. Unset them, or upgrade OpenVINO."
        yield Check("properties", Level.WARN, f"ignored: {' '.join(unknown)}", 0.0, fix)


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / 1e9:,.1f} GB free at {folder}"
    if free < LITTLE_SPACE:
        level = Level.FAIL if free < NO_SPACE else Level.WARN
        return detail, level, "Free some space, or set EMBEDQ_CACHE_DIR to another disk."
    return detail, Level.OK, ""


def _assigned_device(settings: WorkerSettings) -> Device | None:
    try:
        return choose_placement(settings).assigned_device
    except DeviceError:
        return None  # the check of the engine reports it


def _describe(model: Model | None) -> str:
    if model is None:
        return "none (stub engine)"
    source = f", weights {model.weights_precision}, output {model.output}" if model.output else ""
    return (
        f"{model.label}, {model.dim} components, {model.summary()}{source}, checksums match, "
        f"identity {model.identity[:12]}"
    )
