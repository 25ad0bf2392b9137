"""Find, choose and lock the NPU of a worker. No Celery, no Redis, no runtime."""
