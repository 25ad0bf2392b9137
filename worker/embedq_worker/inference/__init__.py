"""Texts in, verified vectors out. No Celery, no Redis."""
