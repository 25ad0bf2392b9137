"""Writes OpenTelemetry spans if tracing is on; the library is imported only then.

A job is one trace. The message headers carry its context, in the form that the Celery
instrumentation of OpenTelemetry reads. No span contains a text.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Final

from embedq.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

#: Entry point of the exporter if OTEL_TRACES_EXPORTER is not set.
DEFAULT_EXPORTER: Final = "otlp_proto_http"

#: Value of OTEL_TRACES_EXPORTER -> entry point, where they differ.
_ALIASES: Final = {"otlp": DEFAULT_EXPORTER}

#: Tracer of this process; None while tracing is off.
_tracer: Tracer | None = None


def enable(service: str) -> TracerProvider | None:
    """Turn tracing on in this process.

    Uses the program's tracer provider if it has one. Otherwise creates one that is configured by
    OTEL_TRACES_EXPORTER and OTEL_EXPORTER_OTLP_ENDPOINT.

    Args:
        service: service name if OTEL_SERVICE_NAME is not set.

    Returns:
        The created provider, or None if the program has one.

    Raises:
        SettingsError: the library is missing, or the exporter is unknown.
    """
    global _tracer
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError:
        raise SettingsError(
            "EMBEDQ_TRACES needs OpenTelemetry. Run: pip install 'embedq[otel]'"
        ) from None
    created = None
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        name = os.environ.get("OTEL_SERVICE_NAME", service)
        created = TracerProvider(resource=Resource.create({"service.name": name}))
        created.add_span_processor(BatchSpanProcessor(_exporter()))
        trace.set_tracer_provider(created)
    _tracer = trace.get_tracer("embedq")
    return created


def is_on() -> bool:
    """Return whether tracing is on in this process."""
    return _tracer is not None


def _exporter() -> Any:
    configured = os.environ.get("OTEL_TRACES_EXPORTER") or DEFAULT_EXPORTER
    name = _ALIASES.get(configured, configured)
    for exporter in entry_points(group="opentelemetry_traces_exporter", name=name):
        return exporter.load()()
    known = sorted({e.name for e in entry_points(group="opentelemetry_traces_exporter")})
    raise SettingsError(
        f"OTEL_TRACES_EXPORTER: expected one of {', '.join(known) or 'none installed'}, "
        f"got {configured}. Install the exporter, or set EMBEDQ_TRACES=false."
    )


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """Run the body within a span of the current trace."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=_prefixed(attributes)):
        yield


class JobTrace:
    """Span of a job, from its first batch to its last result, and the spans of its batches."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._span: Span | None = None

    def begin(self) -> None:
        """Start the job's span, as a child of the caller's current span, if tracing is on."""
        if _tracer is not None:
            self._span = _tracer.start_span(
                "embedq.submit", attributes=_prefixed({"job": self._job})
            )

    @contextmanager
    def publishing(self, headers: MutableMapping[str, Any], **attributes: int) -> Iterator[None]:
        """Run the body within the span of a publish, and add the trace context to the headers."""
        with self._child_span("embedq.publish", attributes, producer=True):
            if self._span is not None:
                from opentelemetry.propagate import inject

                inject(headers)
            yield

    @contextmanager
    def collecting(self, **attributes: int) -> Iterator[None]:
        """Run the body within the span of collecting a batch's vectors from Redis."""
        with self._child_span("embedq.collect", attributes):
            yield

    def end(self) -> None:
        """End the job's span; a second call does nothing."""
        if self._span is not None and self._span.is_recording():
            self._span.end()

    @contextmanager
    def _child_span(
        self, name: str, attributes: dict[str, int], *, producer: bool = False
    ) -> Iterator[None]:
        if self._span is None or _tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind, set_span_in_context

        kind = SpanKind.PRODUCER if producer else SpanKind.INTERNAL
        with _tracer.start_as_current_span(
            name, set_span_in_context(self._span), kind, attributes=_prefixed(attributes)
        ):
            yield


def _prefixed(attributes: MutableMapping[str, Any]) -> dict[str, Any]:
    return {f"embedq.{key}": value for key, value in attributes.items()}
