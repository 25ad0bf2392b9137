"""What producer and worker agree on: enums, limits, codecs. No Redis, no Celery, no files."""
