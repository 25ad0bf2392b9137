"""Spans of OpenTelemetry, or nothing at all: the library is imported only where tracing is on.

A batch is one trace from `submit` to its result. Its context travels in the headers of the message,
as the official instrumentation of Celery reads it on a worker. No text is in any span.
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

#: Name of the exporter if OTEL_TRACES_EXPORTER does not say, and what that variable calls it.
DEFAULT_EXPORTER: Final = "otlp_proto_http"


_ALIASES: Final = {"otlp": DEFAULT_EXPORTER}


_NEEDS: Final = "EMBEDQ_TRACES needs OpenTelemetry. Run: pip install 'embedq[otel]'"


#: Of this process; None while tracing is off.
_tracer: Tracer | None = None


def enable(service: str) -> TracerProvider | None:
    """Trace from now on in this process.

    A program that has a tracer provider keeps it. Otherwise one is made, which sends to where the
    variables OTEL_TRACES_EXPORTER and OTEL_EXPORTER_OTLP_ENDPOINT say.

    Args:
        service: name of this room, unless OTEL_SERVICE_NAME says another.

    Returns:
        The provider that was made, or None.

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
        raise SettingsError(_NEEDS) from None
    made = None
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        name = os.environ.get("OTEL_SERVICE_NAME", service)
        made = TracerProvider(resource=Resource.create({"service.name": name}))
        made.add_span_processor(BatchSpanProcessor(_exporter()))
        trace.set_tracer_provider(made)
    _tracer = trace.get_tracer("embedq")
    return made


def is_on() -> bool:
    """Tell whether this process traces."""
    return _tracer is not None


def _exporter() -> Any:
    asked = os.environ.get("OTEL_TRACES_EXPORTER") or DEFAULT_EXPORTER
    name = _ALIASES.get(asked, asked)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        return found.load()()
    known = sorted({e.name for e in entry_points(group="opentelemetry_traces_exporter")})
    raise SettingsError(
        f"OTEL_TRACES_EXPORTER: expected one of {', '.join(known) or 'none installed'}, "
        f"got {asked}. Install the exporter, or turn EMBEDQ_TRACES off."
    )


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """Show the body as a span of the current trace."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=_named(attributes)):
        yield


class JobTrace:
    """The span of a job, from its first batch to its last result, and those of its batches."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._span: Span | None = None

    def begin(self) -> None:
        """Begin, if tracing is on, within whatever the caller is tracing."""
        if _tracer is not None:
            self._span = _tracer.start_span("embedq.submit", attributes=_named({"job": self._job}))

    @contextmanager
    def publishing(self, headers: MutableMapping[str, Any], **attributes: int) -> Iterator[None]:
        """Show the publishing of a batch, whose headers then carry the trace on."""
        with self._within("embedq.publish", attributes, producer=True):
            if self._span is not None:
                from opentelemetry.propagate import inject

                inject(headers)
            yield

    @contextmanager
    def collecting(self, **attributes: int) -> Iterator[None]:
        """Show the way of a batch's vectors from Redis to the caller."""
        with self._within("embedq.collect", attributes):
            yield

    def end(self) -> None:
        """End the job's span; a second call does nothing."""
        if self._span is not None and self._span.is_recording():
            self._span.end()

    @contextmanager
    def _within(
        self, name: str, attributes: dict[str, int], *, producer: bool = False
    ) -> Iterator[None]:
        if self._span is None or _tracer is None:
            yield
            return
        from opentelemetry.trace import SpanKind, set_span_in_context

        kind = SpanKind.PRODUCER if producer else SpanKind.INTERNAL
        with _tracer.start_as_current_span(
            name, set_span_in_context(self._span), kind, attributes=_named(attributes)
        ):
            yield


def _named(attributes: MutableMapping[str, Any]) -> dict[str, Any]:
    return {f"embedq.{key}": value for key, value in attributes.items()}
