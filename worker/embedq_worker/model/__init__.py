"""Model files: find, fetch, verify, describe, build as ONNX. No Celery, no Redis, no runtime."""
