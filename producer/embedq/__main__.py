"""`python -m embedq` is `embedq`."""

from embedq.cli.main import main

main()
