"""What operators see: tracing, status, metrics, exporter. Changes no state; no Celery."""
