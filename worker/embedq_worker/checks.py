"""What `embedq-worker check` looks at, one line each, with the next step for what is not well."""

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
from embedq.patience import patiently
from embedq.redis_client import open_redis
from embedq.settings import mask_password
from embedq_worker.lifecycle import Serving, find_model, open_serving
from embedq_worker.models import Model
from embedq_worker.settings import WorkerSettings

#: Packages whose version decides how a node behaves.
PACKAGES: Final = ("embedq", "celery", "kombu", "redis", "onnxruntime", "openvino", "tokenizers")
#: Free bytes below which a folder is worth a warning, and an error.
LITTLE_SPACE, NO_SPACE = 1_000_000_000, 200_000_000


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    RED = "red"


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
    mend: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the check for JSON."""
        return asdict(self)


#: What a look finds: a detail, and what is not well about it with its mend.
Finding = tuple[str, Level, str]


def run(settings: WorkerSettings) -> Iterator[Check]:
    """Yield every check as soon as it is done, each before those that depend on it."""
    yield _check("versions", lambda: (_versions(), Level.OK, ""))
    yield _check("broker", lambda: _redis(_socket_form(settings.broker_url)))
    yield _check("results", lambda: _redis(settings.results_url))
    yield _check("disk", lambda: _disk(settings.cache_dir))
    found: list[Model | None] = []

    def model() -> Finding:
        found.append(find_model(settings))
        return _describe(found[0]), Level.OK, ""

    looked = _check("model", model)
    yield looked
    if looked.level is not Level.RED:
        yield from _engine(settings, found[0])


def _engine(settings: WorkerSettings, model: Model | None) -> Iterator[Check]:
    opened: list[Serving] = []

    def engine() -> Finding:
        serving = open_serving(settings, model)
        opened.append(serving)
        serving.close()
        shown = f"{serving.engine.name} on {serving.engine.device}, {serving.engine.precision}"
        return shown, Level.OK, ""

    yield _check("engine", engine)
    for serving in opened:
        report = serving.report
        figures = (
            f"{report.reason} Largest deviation {report.max_deviation:.1e}, "
            f"smallest cosine {report.min_cosine:.6f}"
        )
        yield Check("self-test", Level.OK, figures, report.seconds)


def _check(name: str, look: Callable[[], Finding]) -> Check:
    began = time.monotonic()
    try:
        detail, level, mend = look()
    except EmbedqError as error:
        detail, level, mend = str(error), Level.RED, ""
    return Check(name, level, detail, time.monotonic() - began, mend)


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def _redis(url: str) -> Finding:
    client = open_redis(url, connect_timeout_s=2, timeout_s=2)
    shown = mask_password(url)

    def ask() -> tuple[dict[str, Any], dict[str, str]]:
        info = client.info()
        try:
            config = cast(dict[str, str], client.config_get("maxmemory-policy", "appendonly"))
        except ResponseError:  # a managed Redis may not let us ask
            config = {}
        return info, config

    info, config = patiently(ask, patience_s=0, on_wait=lambda _: None, where=shown)
    client.close()
    limit = int(info.get("maxmemory", 0))
    policy = info.get("maxmemory_policy") or config.get("maxmemory-policy", "unknown")
    detail = (
        f"Redis {info.get('redis_version', 'unknown')} at {shown}, {policy}, "
        f"AOF {'on' if info.get('aof_enabled') else 'off'}, "
        f"{int(info.get('used_memory', 0)) / 1e6:,.0f} of "
        f"{f'{limit / 1e6:,.0f}' if limit else 'unlimited'} MB used"
    )
    if policy not in ("noeviction", "unknown"):
        mend = "It may evict batches: CONFIG SET maxmemory-policy noeviction."
        return detail, Level.RED, mend
    if not info.get("aof_enabled"):
        return detail, Level.WARN, "A restart loses what is queued: CONFIG SET appendonly yes."
    if not limit:
        return detail, Level.WARN, "It may take all memory of its host: CONFIG SET maxmemory 2gb."
    return detail, Level.OK, ""


def _disk(folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / 1e9:,.1f} GB free at {folder}"
    if free < NO_SPACE:
        return detail, Level.RED, "Free some space, or set EMBEDQ_CACHE_DIR to another disk."
    if free < LITTLE_SPACE:
        return detail, Level.WARN, "Free some space, or set EMBEDQ_CACHE_DIR to another disk."
    return detail, Level.OK, ""


def _socket_form(url: str) -> str:
    """Turn kombu's URL of a Unix socket into redis-py's."""
    if not url.startswith("redis+socket://"):
        return url
    path, _, query = url.removeprefix("redis+socket://").partition("?")
    return f"unix://{path}?{query.replace('virtual_host=', 'db=')}"


def _describe(model: Model | None) -> str:
    if model is None:
        return "none needed by the stub"
    return (
        f"{model.label}, {model.dim} components, {model.max_length} tokens, checksums good, "
        f"identity {model.identity[:12]}"
    )
