"""Run one model on one device: token batches in, vectors out. No Celery, Redis or tokenizer."""
