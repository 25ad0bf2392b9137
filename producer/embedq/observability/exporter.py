"""The fleet as Prometheus sees it: both Redis read at each scrape, and nothing kept in between."""

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
    """Reads the fleet when it is scraped; a Redis that is away is a value, not an error."""

    def __init__(self, broker: Redis, results: Redis) -> None:
        """Take clients with short timeouts: a scrape must end before Prometheus gives it up."""
        self._servers = {"broker": broker, "results": results}

    def describe(self) -> Iterable[Metric]:
        """Answer nothing, so that registering this asks Redis nothing."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Yield all families that this scrape has samples of."""
        began = time.perf_counter()
        samples: list[Sample] = []
        try:
            samples += fleet_samples(
                fetch_status(self._servers["broker"], self._servers["results"])
            )
            here = dict.fromkeys(self._servers, True)
        except RedisError as error:
            log.warning("scrape_failed reason=%s", type(error).__name__)
            samples.clear()
            with ThreadPoolExecutor(len(self._servers)) as pool:
                up = pool.map(_answers, self._servers.values())
                here = dict(zip(self._servers, up, strict=True))
        samples += [Sample("embedq_redis_up", (name,), float(up)) for name, up in here.items()]
        # Both may answer a ping and yet refuse the look: a user without the rights, for one.
        samples.append(Sample("embedq_up", (), float(len(samples) > len(here))))
        took_s = time.perf_counter() - began
        samples.append(Sample("embedq_scrape_duration_seconds", (), took_s))
        yield from _families(samples)


def serve(broker: Redis, results: Redis, host: str, port: int) -> WSGIServer:
    """Open the exporter's port; the caller runs `serve_forever` on what it gets.

    Args:
        broker, results: clients with short timeouts.
        host: address to listen on.
        port: TCP port; 0 takes a free one, which is in ``server_port``.

    Raises:
        OSError: the port cannot be had.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FleetCollector(broker, results))
    return make_server(host, port, application(registry), ThreadingWSGIServer, _Quiet)


def application(registry: CollectorRegistry) -> Application:
    """Return a web application: /metrics scrapes, /healthz says that the process lives."""
    scrape: Any = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return list(scrape(environ, start_response))
        found = path == "/healthz"
        start_response(
            "200 OK" if found else "404 Not Found", [("Content-Type", "text/plain; charset=utf-8")]
        )
        return [b"ok\n" if found else b"There is /metrics, and /healthz.\n"]

    return answer


class _Quiet(WSGIRequestHandler):
    #: Seconds that a client may take over its request; a half-open one must not keep a thread.
    timeout = 10

    def log_message(self, *args: Any) -> None:
        """Say nothing of each scrape."""


def _answers(server: Redis) -> bool:
    try:
        return bool(server.ping())
    except RedisError:
        return False


def _families(samples: Iterable[Sample]) -> Iterator[Metric]:
    by_name: dict[str, list[Sample]] = {}
    for sample in samples:
        by_name.setdefault(sample.name, []).append(sample)
    for metric in METRICS:
        found = by_name.pop(metric.name, [])
        if found:
            family: Any = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.labels)
            for sample in found:
                if metric.kind is Kind.SUMMARY:
                    family.add_metric(sample.labels, sample.count, sample.value)
                else:
                    family.add_metric(sample.labels, sample.value)
            yield family
    if by_name:
        raise RuntimeError(f"{', '.join(by_name)} is not among the metrics. This is a bug.")
