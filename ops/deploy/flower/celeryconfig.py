"""Configure Flower's Celery app: the URL of the broker and the content that it accepts."""

from embedq.settings import ProducerSettings

broker_url = ProducerSettings.load().broker_url
# Events and replies of workers are JSON.
accept_content = ["json"]
broker_connection_retry_on_startup = True
broker_transport_options = {
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "client_name": "embedq-flower",
    # The shortest timeout of all consumers applies to every unacknowledged message. Flower consumes
    # none, so its timeout must be the longest.
    "visibility_timeout": 86_400,
}
