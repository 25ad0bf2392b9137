"""Celery's main process. Never loads a runtime: an NPU context does not survive a fork."""
