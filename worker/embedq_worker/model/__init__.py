"""Finds, verifies and describes models, builds ONNX graphs. No Celery, no Redis, no runtime."""
