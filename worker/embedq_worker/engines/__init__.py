"""One model on one device: token batches in, vectors out. No Celery, no Redis, no tokenizer."""
