"""Fake Celery consumer for tests of bootsteps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from embedq_worker.main_process.controller import WorkerContext
from embedq_worker.settings import WorkerSettings


def fake_consumer(settings: WorkerSettings, controller: Any) -> SimpleNamespace:
    """Return the part of a Celery consumer that bootsteps read."""
    context = WorkerContext(settings, controller)
    return SimpleNamespace(app=SimpleNamespace(conf=SimpleNamespace(embedq=context)))
