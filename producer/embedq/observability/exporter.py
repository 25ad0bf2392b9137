"""Serves the fleet's metrics to Prometheus; each scrape reads both Redis, nothing is cached."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.exposition import ThreadingWSGIServer, make_wsgi_app
from prometheus_client.registry import Collector
from redis import Redis
from redis.exceptions import RedisError

from embedq.observability.metrics import METRICS, Kind, Sample, fleet_samples
from embedq.observability.status import fetch_status

log = logging.getLogger(__name__)

_FAMILIES = {
    Kind.GAUGE: GaugeMetricFamily,
    Kind.COUNTER: CounterMetricFamily,
    Kind.SUMMARY: SummaryMetricFamily,
}

Application: TypeAlias = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class FleetCollector(Collector):
    """Collects all metrics of the fleet; an unreachable Redis is a metric, not an error."""

    def __init__(self, broker: Redis, results: Redis) -> None:
        """Create a collector.

        Args:
            broker, results: clients whose timeouts are shorter than the scrape timeout.
        """
        self._servers = {"broker": broker, "results": results}

    def describe(self) -> Iterable[Metric]:
        """Return nothing, so that registration does not read Redis."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield every metric family that has samples in this scrape."""
        began = time.perf_counter()
        samples: list[Sample] = []
        try:
            samples += fleet_samples(
                fetch_status(self._servers["broker"], self._servers["results"])
            )
            up = dict.fromkeys(self._servers, True)
        except RedisError as error:
            log.warning("scrape_failed reason=%s", type(error).__name__)
            samples.clear()
            with ThreadPoolExecutor(len(self._servers)) as pool:
                answered = pool.map(_ping, self._servers.values())
                up = dict(zip(self._servers, answered, strict=True))
        # Both can answer a ping and still reject the reads, for example without permissions.
        samples.append(Sample("embedq_up", (), float(bool(samples))))
        samples += [Sample("embedq_redis_up", (name,), float(here)) for name, here in up.items()]
        took_s = time.perf_counter() - began
        samples.append(Sample("embedq_scrape_duration_seconds", (), took_s))
        yield from _families(samples)


def serve(broker: Redis, results: Redis, host: str, port: int) -> WSGIServer:
    """Open the exporter's port; the caller runs `serve_forever()` on the returned server.

    Args:
        broker, results: clients whose timeouts are shorter than the scrape timeout.
        host: address to listen on.
        port: TCP port; 0 chooses a free one, see ``server_port``.

    Raises:
        OSError: the port cannot be opened.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(broker, results))
    return make_server(host, port, application(registry), ThreadingWSGIServer, _Quiet)


def application(registry: CollectorRegistry) -> Application:
    """Return a WSGI application: /metrics scrapes, /healthz answers without Redis."""
    scrape: Any = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return list(scrape(environ, start_response))
        healthy = path == "/healthz"
        start_response(
            "200 OK" if healthy else "404 Not Found",
            [("Content-Type", "text/plain; charset=utf-8")],
        )
        return [b"ok\n" if healthy else b"Not found. Paths: /metrics and /healthz.\n"]

    return answer


class _Quiet(WSGIRequestHandler):
    #: Timeout of a request, seconds; a half-open connection must not block a thread.
    timeout = 10

    def log_message(self, *args: Any) -> None:
        """Log nothing: there is a request per scrape."""


def _ping(server: Redis) -> bool:
    try:
        return bool(server.ping())
    except RedisError:
        return False


def _families(samples: Iterable[Sample]) -> Iterator[Metric]:
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    for metric in METRICS:
        if of_metric := by_name.pop(metric.name, []):
            family: Any = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for sample in of_metric:
                if metric.kind is Kind.SUMMARY:
                    family.add_metric(sample.labels, sample.count, sample.value)
                else:
                    family.add_metric(sample.labels, sample.value)
            yield family
    if by_name:
        raise RuntimeError(f"Samples of unknown metrics: {', '.join(by_name)}. This is a bug.")
