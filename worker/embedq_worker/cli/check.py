"""embedq-worker check.

What a check of `embedq-worker check` found, and how it is shown.

What `embedq-worker check` says of a Redis: whether it keeps what is queued.

What `embedq-worker check` looks at, one line each, with the next step for what is not well.
"""

from __future__ import annotations

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, cast

from redis.exceptions import ResponseError

from embedq.errors import EmbedqError
from embedq.store.connection import RedisConnection
from embedq_worker.cli import check_npu
from embedq_worker.device.placement import choose_placement
from embedq_worker.engines.model_cache import QuantizedModelStore
from embedq_worker.files import private_dir
from embedq_worker.inference.opener import EngineOpener, claim_device, open_placed
from embedq_worker.inference.serving import EngineSet
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import WorkerSettings


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    FAIL = "red"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was looked at.
        level: ok; warn, what a production fleet should not have; red, what cannot work.
        detail: what was found.
        seconds: how long the look took.
        mend: the next step, where one is due.
    """

    name: str
    level: Level
    detail: str
    seconds: float
    fix: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the check for JSON."""
        return asdict(self)


#: What a look finds: a detail, and what is not well about it with its mend.
Finding = tuple[str, Level, str]


def look(url: str) -> Finding:
    """Ask a Redis what it keeps, and where.

    Raises:
        QueueUnavailable: it does not answer.
    """
    redis = RedisConnection.open(url, connect_timeout_s=2, timeout_s=2)
    client = redis.client

    def ask() -> tuple[dict[str, Any], dict[str, str]]:
        info = client.info()
        try:
            config = cast(dict[str, str], client.config_get("maxmemory-policy", "appendonly"))
        except ResponseError:  # a managed Redis may not let us ask
            config = {}
        return info, config

    info, config = redis.call(ask)
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
        mend = "It may evict batches: CONFIG SET maxmemory-policy noeviction."
        return detail, Level.FAIL, mend
    if not info.get("aof_enabled"):
        return detail, Level.WARN, "A restart loses what is queued: CONFIG SET appendonly yes."
    if not limit:
        return detail, Level.WARN, "It may take all memory of its host: CONFIG SET maxmemory 2gb."
    return detail, Level.OK, ""


#: Packages whose version decides how a worker behaves.
PACKAGES: Final = ("embedq", "celery", "kombu", "redis", "onnxruntime", "openvino", "tokenizers")


#: Free bytes below which a folder is worth a warning, and an error.
LITTLE_SPACE, NO_SPACE = 1_000_000_000, 200_000_000


#: What to do about a red line whose error does not say it, by the name of the line.
_NEXT_STEPS: Final = {
    "broker": "Start that Redis, or set EMBEDQ_BROKER_URL.",
    "results": "Start that Redis, or set EMBEDQ_RESULTS_URL.",
    "engine": "Look at the lines above; --device cpu does without an NPU, and "
    "EMBEDQ_ENGINE=onnxruntime without OpenVINO.",
}


_ANY_STEP: Final = "Look at what is in force: embedq-worker settings"


def run(settings: WorkerSettings) -> Iterator[Check]:
    """Yield every check as soon as it is done, each before those that depend on it."""
    yield _check("versions", lambda: (_versions(), Level.OK, ""))
    yield _check("broker", lambda: look(settings.broker_url))
    yield _check("results", lambda: look(settings.results_url))
    yield _check("folders", lambda: _folders(settings))
    yield _check("disk", lambda: _disk(settings.cache_dir))
    yield from _device(settings)
    found: list[Model | None] = []

    def model() -> Finding:
        found.append(find_model(settings))
        return _describe(found[0]), Level.OK, ""

    looked = _check("model", model)
    yield looked
    if looked.level is not Level.FAIL:
        yield from _engine(settings, found[0])


def _device(settings: WorkerSettings) -> Iterator[Check]:
    """Yield the lines about the NPU; what auto can do without is a warning."""
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
        placement = choose_placement(settings)
        claim = claim_device(settings, placement)
        serving = open_placed(settings, placement, model)
        opened.append(serving)
        serving.close()
        if claim is not None:
            claim.release()
        used = serving.standard.engine
        shown = f"{used.name} on {used.device}, {used.precision}"
        return f"{shown}. {placement.reason}", Level.OK, ""

    yield _check("engine", engine)
    for serving in opened:
        yield from _runtime(settings, serving)
        report = serving.standard.report
        figures = (
            f"{report.reason} Largest deviation {report.max_deviation:.1e}, "
            f"smallest cosine {report.min_cosine:.6f}, {report.inversions} inversions"
        )
        yield Check("self-test", Level.OK, figures, report.seconds)
        if model is not None and serving.model_info.quantized:
            yield _check("int8", lambda: _int8(settings, model))


def _int8(settings: WorkerSettings, model: Model) -> Finding:
    """Prove the quantized copy, and show the report that was made with it."""
    kept = QuantizedModelStore(settings.cache_dir, model).describe()
    proven = EngineOpener(settings, model).open_int8()
    proven.close()
    return f"{kept}; self-test smallest cosine {proven.report.min_cosine:.4f}", Level.OK, ""


def _runtime(settings: WorkerSettings, serving: EngineSet) -> Iterator[Check]:
    """Yield what the engine says of itself, and what of our wishes its plugin does not know."""
    standard = serving.standard
    details = {**standard.engine.details, "chosen": standard.why}
    if standard.layout is not None:
        details["layout"] = standard.layout.describe()
    ignored = details.pop("ignored", "")
    shown = ", ".join(f"{name} {value}" for name, value in details.items())
    yield Check("runtime", Level.OK, shown, 0.0)
    # A warning and not red: this driver has just passed the self-test.
    for line in check_npu.driver_age(details.get("npu_driver_version", "")):
        yield Check(line.name, Level.OK if line.ok else Level.WARN, line.detail, 0.0, line.fix)
    wishes = [*settings.npu_properties]
    wishes += ["NPU_COMMANDLIST_MODE"] if settings.npu_commandlist_mode else []
    unknown = [word for word in ignored.split() if word.partition("=")[0] in wishes]
    if unknown:
        mend = "This plugin does not know them; unset them, or use an OpenVINO that does."
        yield Check("properties", Level.WARN, f"ignored: {' '.join(unknown)}", 0.0, mend)


def _check(name: str, look: Callable[[], Finding]) -> Check:
    began = time.monotonic()
    try:
        detail, level, mend = look()
    except EmbedqError as error:
        detail, mend = check_npu.split_fix(error)
        level, mend = Level.FAIL, mend or _NEXT_STEPS.get(name, _ANY_STEP)
    return Check(name, level, detail, time.monotonic() - began, mend)


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
    if free < NO_SPACE:
        return detail, Level.FAIL, "Free some space, or set EMBEDQ_CACHE_DIR to another disk."
    if free < LITTLE_SPACE:
        return detail, Level.WARN, "Free some space, or set EMBEDQ_CACHE_DIR to another disk."
    return detail, Level.OK, ""


def _describe(model: Model | None) -> str:
    if model is None:
        return "none needed by the stub"
    return (
        f"{model.label}, {model.dim} components, {model.max_length} tokens, checksums good, "
        f"identity {model.identity[:12]}"
    )
