"""The command `embedq-worker`."""
