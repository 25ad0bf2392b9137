"""Exit codes of the `embedq` command, and errors as one sentence with its code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from embedq import errors

EXIT_OK, EXIT_FAILED, EXIT_SETTINGS, EXIT_INPUT = 0, 1, 2, 3
EXIT_UNAVAILABLE, EXIT_LOCAL, EXIT_RESULT, EXIT_INTERRUPTED = 4, 5, 6, 130

_EXIT_CODES: dict[type[errors.EmbedqError], int] = {
    errors.SettingsError: EXIT_SETTINGS,
    errors.InputError: EXIT_INPUT,
    errors.QueueUnavailable: EXIT_UNAVAILABLE,
    errors.NoNode: EXIT_UNAVAILABLE,
    errors.LocalStartFailed: EXIT_LOCAL,
    errors.ResultError: EXIT_RESULT,
}


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """Print an error of ours as one message and leave with its exit code."""
    try:
        yield
    except errors.EmbedqError as error:
        click.echo(f"embedq: {error}", err=True)
        sys.exit(next((c for kind, c in _EXIT_CODES.items() if isinstance(error, kind)), 1))
