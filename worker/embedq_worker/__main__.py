"""`python -m embedq_worker` is `embedq-worker`."""

from embedq_worker.cli import main

main()
