"""Finds, chooses and locks the NPU of a worker. No Celery, no Redis, no runtime."""
