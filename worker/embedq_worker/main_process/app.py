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
from embedq_worker.main_process.controller import WorkerContext, WorkerController
from embedq_worker.settings import WorkerSettings

STEPS = (
    QueueConsumptionStep,
    LeaseRenewalStep,
    PoolMaintenanceStep,
    HeartbeatStep,
    ControlStep,
    LivenessStep,
)


def build_app(settings: WorkerSettings) -> Celery:
    """Build the app of a worker; `app.conf.embedq` is its WorkerContext."""
    transport.install()
    app = Celery("embedq_worker", set_as_current=True)
    app.conf.update(_options(settings))
    app.conf.embedq = WorkerContext(settings, WorkerController(settings, None))
    # Flower and `celery inspect` must be able to decode the answers with Celery's defaults.
    app.control.mailbox.serializer = "json"  # type: ignore[attr-defined] # not in celery-types
    app.steps["consumer"].update(STEPS)
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
        # A misspelled queue name must raise, not create a queue that no worker consumes.
        "task_create_missing_queues": False,
        # A batch is acknowledged when it is committed, not when it is received.
        "task_acks_late": True,
        # A batch whose engine call timed out is requeued: the device is at fault.
        "task_acks_on_timeout": False,
        # Requeue the batch of a pool process that died; Celery and the ledger count the attempts.
        "task_retry_on_worker_lost": True,
        # Applies only if publishing that retry fails.
        "task_reject_on_worker_lost": True,
        # One batch at a time: a prefetched one would wait here while another worker idles.
        "worker_prefetch_multiplier": 1,
        "worker_concurrency": 1,
        "worker_pool": "prefork",
        # Forking is fast, and safe because the main process imports no runtime.
        "worker_pool_start_method": "fork",
        # The default of 4 s kills a replacement process that is still loading its model.
        "worker_proc_alive_timeout": 600.0,
        # Recycling a pool process would load the model again.
        "worker_max_tasks_per_child": None,
        # The ledger detects duplicates; Celery would fetch whole results to do so.
        "worker_deduplicate_successful_tasks": False,
        # True would end a process with a loaded model at every short loss of the connection.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": 30.0,
        "worker_enable_remote_control": True,
        # Flower is fed by events.
        "worker_send_task_events": True,
        "task_send_sent_event": True,
        "task_track_started": False,
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_serializer": "msgpack",
        "result_serializer": "msgpack",
        # No pickle, no YAML; json is for remote control messages.
        "accept_content": ["msgpack", "json"],
        # Celery must not replace the log handlers or redirect what a runtime prints.
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "broker_connection_retry_on_startup": True,
        # By default the worker exits after 100 attempts to connect.
        "broker_connection_max_retries": None,
        "broker_transport_options": {
            "visibility_timeout": settings.visibility_timeout_s,
            # Seconds between two searches for messages whose lease has expired.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # With the default of 300 s, a worker that dies during the search blocks recovery.
            "unacked_mutex_expire": 30,
            # Without it, a publish on a dead connection blocks for ever.
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
