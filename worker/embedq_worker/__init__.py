"""Celery workers that compute embeddings, one device each."""
