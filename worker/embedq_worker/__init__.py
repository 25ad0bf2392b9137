"""The embedq worker: Celery workers that turn texts into vectors, one device each."""
