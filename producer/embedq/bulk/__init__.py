"""`embedq embed`: files in, files out, checkpoints, update, estimate, search."""
