"""Exit codes of `embedq`, and its messages and progress on stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from embedq import errors
from embedq.bulk.request import RunProgress, format_duration
from embedq.cli.common import EXIT_SETTINGS, exit_with_error

#: Exit codes of `embedq`, beside EXIT_SETTINGS; docs/cli.md lists their causes.
EXIT_OK, EXIT_FAILED, EXIT_INPUT = 0, 1, 3
EXIT_UNAVAILABLE, EXIT_LOCAL, EXIT_RESULT, EXIT_INTERRUPTED = 4, 5, 6, 130

#: Interval of progress lines without a terminal, in seconds.
PLAIN_EVERY_S = 10.0

_EXIT_CODES: dict[type[errors.EmbedqError], int] = {
    errors.SettingsError: EXIT_SETTINGS,
    errors.InputError: EXIT_INPUT,
    errors.QueueUnavailable: EXIT_UNAVAILABLE,
    errors.NoWorker: EXIT_UNAVAILABLE,
    errors.LocalStartFailed: EXIT_LOCAL,
    errors.ResultError: EXIT_RESULT,
}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print an EmbedqError as one message and exit with its code."""
    try:
        yield
    except errors.EmbedqError as error:
        exit_with_error("embedq", error, _EXIT_CODES)


class RunDisplay:
    """Shows the progress of a run on stderr: a live line on a terminal, else a line now and then.

    Attributes:
        workers: returns the number of workers per device, as text; to be set by the caller.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """Create a display; if quiet, it shows messages but no progress."""
        self._console = Console(stderr=True, highlight=False)
        self._live = self._console.is_terminal and not quiet
        self._quiet = quiet
        self.workers: Callable[[], str] = str
        self._last_plain = time.monotonic()
        self._bar = Bar(
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        if self._live:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def note(self, message: str) -> None:
        """Show a message."""
        self._console.print(f"embedq: {message}", markup=False, soft_wrap=True)

    def starting(self, step: str) -> None:
        """Show the current step of the start."""
        self._bar.update(self._task, description=step)

    def update(self, progress: RunProgress) -> None:
        """Show the progress of the run."""
        fraction = progress.reading.fraction()
        line = self._line(progress, fraction)
        if self._live:
            # In thousandths, because the number of documents is unknown until the end.
            total = None if fraction is None else 1000
            done = 0 if fraction is None else 1000 * fraction
            self._bar.update(self._task, total=total, completed=done, description=line)
        elif not self._quiet and time.monotonic() - self._last_plain >= PLAIN_EVERY_S:
            self._last_plain = time.monotonic()
            share = "" if fraction is None else f"{fraction:.0%} "
            self._console.print(f"embedq: {share}{line}", markup=False, soft_wrap=True)

    def _line(self, progress: RunProgress, fraction: float | None) -> str:
        seconds = max(1e-6, time.monotonic() - (progress.started or time.monotonic()))
        parts = [
            f"{progress.resumed + progress.texts:,} texts",
            f"{progress.texts / seconds:,.0f} docs/s",
            f"{progress.tokens / seconds:,.0f} tokens/s",
        ]
        if fraction and fraction < 1 and not progress.resumed:
            parts.append(f"{format_duration(seconds * (1 - fraction) / fraction)} left")
        if progress.truncated:
            parts.append(f"{progress.truncated:,} truncated")
        if progress.failed:
            parts.append(f"{progress.failed:,} failed")
        workers = self.workers()
        return "  ".join([*parts, workers] if workers else parts)
