"""The Celery app of a worker; every option with its reason."""

from __future__ import annotations

from typing import Any

from celery import Celery
from kombu import Queue as KombuQueue

from embedq.protocol.contract import Queue
from embedq_worker.main_process import transport
from embedq_worker.main_process.bootsteps import (
    ControlStep,
    HeartbeatStep,
    LeaseRenewalStep,
    LivenessStep,
)
from embedq_worker.main_process.consumer import PoolMaintenanceStep, QueueConsumptionStep
from embedq_worker.settings import WorkerSettings


def add_steps(app: Any) -> None:
    """Add the steps to an app."""
    app.steps["consumer"].update(
        (
            QueueConsumptionStep,
            LeaseRenewalStep,
            PoolMaintenanceStep,
            HeartbeatStep,
            ControlStep,
            LivenessStep,
        )
    )


def build_app(settings: WorkerSettings) -> Celery:
    """Build the app of a worker from its settings."""
    transport.install()
    app = Celery("embedq_worker", set_as_current=True)
    app.conf.update(_options(settings))
    app.conf.embedq = settings
    # What answers `celery inspect` and Flower must be readable with Celery's defaults.
    app.control.mailbox.serializer = "json"  # type: ignore[attr-defined] # not in celery-types
    add_steps(app)
    return app


def _options(settings: WorkerSettings) -> dict[str, Any]:
    committer = "embedq_worker.pool_process.commit:ResultCommitter"
    return {
        "broker_url": settings.broker_url,
        "result_backend": f"{committer}+{settings.results_url}",
        "include": ["embedq_worker.pool_process.tasks"],
        "worker_consumer": "embedq_worker.main_process.consumer:Consumer",
        "task_queues": [KombuQueue(str(name)) for name in Queue],
        "task_default_queue": str(Queue.CPU),
        # A typo in a queue name must raise, not create a queue that nobody reads.
        "task_create_missing_queues": False,
        # A batch leaves Redis when it is committed, not when it is received.
        "task_acks_late": True,
        # A hung engine is a fault of the device, not an answer to the batch.
        "task_acks_on_timeout": False,
        # A child that dies under a batch: the batch comes back, counted; the ledger counts as well.
        "task_retry_on_worker_lost": True,
        # Used only if publishing that retry fails.
        "task_reject_on_worker_lost": True,
        # Exactly one batch in hand: a second would wait here while another worker idles.
        "worker_prefetch_multiplier": 1,
        "worker_concurrency": 1,
        "worker_pool": "prefork",
        # Fork is quick and safe here because the parent never imports a runtime.
        "worker_pool_start_method": "fork",
        # The default of 4 s kills every replacement child that is still loading its model.
        "worker_proc_alive_timeout": 600.0,
        # A recycled child is a model loaded again.
        "worker_max_tasks_per_child": None,
        # The ledger knows what is done; Celery would fetch whole results to find out.
        "worker_deduplicate_successful_tasks": False,
        # True would kill a loaded model at every blip of the network.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": 30.0,
        "worker_enable_remote_control": True,
        # Flower lives on events; measured cost: half a millisecond a batch.
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "task_track_started": False,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_serializer": "msgpack",
        "result_serializer": "msgpack",
        # No pickle, no YAML; json for remote control messages.
        "accept_content": ["msgpack", "json"],
        # Celery must not take over the handlers or redirect prints of the runtime.
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        # The default gives up, and the worker exits, after 100 tries.
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout_s,
            # How soon a dead worker's batch is noticed once its lease has run out.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # The default of 300 s blocks recovery when a worker dies inside the sweep.
            "unacked_mutex_expire": 30,
            # Without it a publish on a dead connection blocks for ever.
            "socket_timeout": 30,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 10,
            "client_name": "embedq-worker",
        },
        "task_publish_retry_policy": {
            "max_retries": 10,
            "interval_start": 0.2,
            "interval_step": 0.5,
            "interval_max": 5,
        },
    }


app = build_app(WorkerSettings.load())
