"""Defines what producer and worker agree on. Pure: no Redis, no Celery, no files."""
