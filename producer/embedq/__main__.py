"""Runs the command `embedq` for `python -m embedq`."""

from embedq.cli.main import main

main()
