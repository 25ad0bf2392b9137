"""Runs one job: batches are published, results collected, lost batches recovered."""
