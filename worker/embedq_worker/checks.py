"""What `embedq-worker check` looks at, one line each, with the next step for each red one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from redis import Redis

from embedq.errors import EmbedqError
from embedq.patience import patiently
from embedq.redis_client import open_redis
from embedq.settings import mask_password
from embedq_worker.lifecycle import find_model, open_serving
from embedq_worker.models import Model
from embedq_worker.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was looked at.
        ok: whether it may stay as it is.
        detail: what was found.
        seconds: how long the look took.
    """

    name: str
    ok: bool
    detail: str
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return the check for JSON."""
        return asdict(self)


def run(settings: WorkerSettings) -> Iterator[Check]:
    """Yield every check as soon as it is done, each before those that depend on it."""
    yield _check("broker", lambda: _redis(_socket_form(settings.broker_url)))
    yield _check("results", lambda: _redis(settings.results_url))
    found: list[Model | None] = []

    def model() -> str:
        found.append(find_model(settings))
        return _describe(found[0])

    looked = _check("model", model)
    yield looked
    if not looked.ok:
        return
    yield from _engine(settings, found[0])


def _engine(settings: WorkerSettings, model: Model | None) -> Iterator[Check]:
    reports: list[str] = []

    def engine() -> str:
        serving = open_serving(settings, model)
        reports.append(serving.report.reason)
        shown = f"{serving.engine.name} on {serving.engine.device}, {serving.engine.precision}"
        serving.close()
        return shown

    opened = _check("engine", engine)
    yield opened
    if opened.ok:
        yield Check("self-test", True, reports[0], opened.seconds)


def _check(name: str, look: Callable[[], str]) -> Check:
    began = time.monotonic()
    try:
        ok, detail = True, look()
    except EmbedqError as error:
        ok, detail = False, str(error)
    return Check(name, ok, detail, time.monotonic() - began)


def _redis(url: str) -> str:
    client: Redis = open_redis(url, connect_timeout_s=2, timeout_s=2)
    shown = mask_password(url)
    info = patiently(
        lambda: client.info("server"), patience_s=0, on_wait=lambda _: None, where=shown
    )
    client.close()
    return f"Redis {info['redis_version']} at {shown}"


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
        f"{model.label}, {model.dim} components, {model.max_length} tokens, "
        f"identity {model.identity[:12]}"
    )
