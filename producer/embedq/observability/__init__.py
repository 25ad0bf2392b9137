"""Shows operators the fleet: status, metrics, exporter, spans. Changes no state; no Celery."""
