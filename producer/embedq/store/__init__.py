"""Reads and writes everything that Redis holds. No Celery, no numpy, no click."""
