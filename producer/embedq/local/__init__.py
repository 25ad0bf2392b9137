"""A private Redis and one worker for `--local`."""
