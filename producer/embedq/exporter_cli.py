"""`embedq exporter`: the fleet for Prometheus."""

from __future__ import annotations

import signal
import sys

import click

from embedq.exits import EXIT_SETTINGS, errors_as_sentences

#: Port that Prometheus finds an exporter on if nobody says otherwise.
PORT = 9469
#: Seconds that a Redis may take to connect, and to answer. Each may be spent six times in one
#: scrape (a look and a ping, with their second tries), which Prometheus gives up after 5 s.
CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S = 0.5, 0.7


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=PORT,
    show_default=True,
    help="Port to listen on; 0 for any.",
)
def exporter(host: str, port: int) -> None:
    """Answer Prometheus on /metrics, and health checks on /healthz."""
    with errors_as_sentences():
        from embedq.redis_client import open_redis
        from embedq.settings import ProducerSettings

        try:
            from embedq.exporter import serve
        except ModuleNotFoundError:
            from embedq.errors import SettingsError

            raise SettingsError(
                "embedq exporter needs the Prometheus client. Run: pip install 'embedq[exporter]'"
            ) from None
        settings = ProducerSettings.load()
        broker, results = (
            open_redis(url, connect_timeout_s=CONNECT_TIMEOUT_S, timeout_s=ANSWER_TIMEOUT_S)
            for url in (settings.broker_url, settings.results_url)
        )
        try:
            server = serve(broker, results, host, port)
        except OSError as error:
            click.echo(f"embedq: cannot listen on {host}:{port} ({error.strerror}).", err=True)
            sys.exit(EXIT_SETTINGS)
        click.echo(f"embedq exporter: http://{host}:{server.server_port}/metrics", err=True)
        # The first process of a container has no default action for SIGTERM.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
