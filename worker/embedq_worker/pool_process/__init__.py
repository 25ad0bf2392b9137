"""Celery's pool process: owns the device, runs the task, commits results."""
