"""Everything that is written to Redis. No Celery, no numpy, no click."""
