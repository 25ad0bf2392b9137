"""What Flower knows of the fleet: where its broker is and what it may read. No task, no model."""

from embedq.settings import ProducerSettings

broker_url = ProducerSettings.load().broker_url
# Events and answers of workers are JSON; nothing else is opened.
accept_content = ["json"]
broker_connection_retry_on_startup = True
broker_transport_options = {
    "socket_timeout": 30,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 10,
    "client_name": "embedq-flower",
    # The shortest of all consumers decides when a held batch is given to another worker. Flower
    # holds none, so it must not be the one that decides.
    "visibility_timeout": 86_400,
}
