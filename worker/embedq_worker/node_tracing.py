"""Tracing of a node's child, by the official instrumentation of Celery."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedq import tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_provider: TracerProvider | None = None


def enable() -> None:
    """Trace each batch of this child; called after the fork, because exporters have threads.

    Raises:
        SettingsError: OpenTelemetry is missing, or its exporter unknown.
    """
    global _provider
    _provider = tracing.enable("embedq-worker")
    from opentelemetry.instrumentation.celery import CeleryInstrumentor

    CeleryInstrumentor().instrument()  # type: ignore[no-untyped-call] # it has no types


def flush() -> None:
    """Send what is left."""
    if _provider is not None:
        _provider.shutdown()
