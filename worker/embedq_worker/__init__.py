"""The embedq worker: Celery nodes that turn texts into vectors, one device each."""
