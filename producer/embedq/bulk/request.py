"""Request, progress and summary of one run of `embedq embed`.

The command imports this module before Celery, so it imports the client for type checking only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from embedq.bulk import writers
from embedq.bulk.readers import Fields, Reading, expand, read
from embedq.jobs.batches import Document
from embedq.protocol.contract import VectorSpec

if TYPE_CHECKING:
    from embedq.client import Client


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """Arguments of `embedq embed`.

    Attributes:
        inputs: file names, globs or ``-`` for standard input.
        output: file to write; its ending chooses the format.
        fields, format, skip_bad_lines: see readers.read.
        prompt_name, prompt: see Client.encode.
        restart: discard the rows of an earlier run.
        pin_engine: resume only with the engine that started the output (a local run).
    """

    inputs: tuple[str, ...]
    output: Path
    fields: Fields = field(default_factory=Fields)
    format: str | None = None
    skip_bad_lines: bool = False
    prompt_name: str | None = None
    prompt: str | None = None
    restart: bool = False
    pin_engine: bool = False

    def files(self) -> list[str]:
        """Return the inputs with their globs expanded.

        Raises:
            InputError: see readers.expand.
        """
        return expand(self.inputs, writers.own_files(self.output))

    def documents(self, progress: RunProgress) -> Iterator[Document]:
        """Read the documents of all inputs and update the progress."""
        return read(
            self.files(),
            fields=self.fields,
            format=self.format,
            skip_bad_lines=self.skip_bad_lines,
            reading=progress.reading,
        )

    def spec(self, client: Client) -> VectorSpec:
        """Return the specification of the vectors."""
        return client.spec(prompt_name=self.prompt_name, prompt=self.prompt)


@dataclass(slots=True)
class RunProgress:
    """Progress of a run, for the display.

    Attributes:
        reading: position in the inputs.
        texts, tokens: number of each that this run has processed.
        truncated, failed: number of such texts in the whole output.
        resumed: texts that an earlier run had finished.
        started: monotonic seconds of the first publish; None before it.
    """

    reading: Reading = field(default_factory=Reading)
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    failed: int = 0
    resumed: int = 0
    started: float | None = None


@dataclass(slots=True)
class RunSummary:
    """Result of a run, as `--json` prints it.

    Attributes:
        total: rows of the output.
        ok, failed, truncated, rerouted: rows with this outcome.
        seconds: duration of the command.
        startup_seconds: time until the first batch was published.
        docs_per_second: speed of this run, from the first publish to the last row written.
        devices: texts embedded in this run, by device.
        resumed: rows that an earlier run had finished.
        skipped_lines: number of skipped bad lines.
        outputs: files of the output.
        updated: with --update, the number of new, changed, kept and removed documents.
    """

    total: int
    ok: int
    failed: int
    truncated: int
    rerouted: int
    seconds: float
    startup_seconds: float
    docs_per_second: float
    devices: dict[str, int]
    resumed: int
    skipped_lines: int
    outputs: list[str]
    updated: dict[str, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as a JSON object."""
        body = asdict(self)
        if self.updated is None:
            del body["updated"]
        return body

    def lines(self) -> list[str]:
        """Return the summary as lines of text."""
        parts = [f"{self.total:,} texts in {self.seconds:.1f} s"]
        if self.docs_per_second:
            parts.append(f"{self.docs_per_second:,.0f} docs/s")
        for name in ("failed", "truncated", "rerouted", "resumed"):
            if count := getattr(self, name):
                parts.append(f"{count:,} {name}")
        parts += [f"{count:,} {name}" for name, count in (self.updated or {}).items()]
        if self.skipped_lines:
            parts.append(f"{self.skipped_lines:,} bad lines skipped")
        return [f"{', '.join(parts)} -> {', '.join(self.outputs)}"]


class ProgressDisplay(Protocol):
    """Interface of the object that shows the progress of a run."""

    def update(self, progress: RunProgress) -> None:
        """Show the progress; called after each batch."""

    def note(self, message: str) -> None:
        """Show a message."""


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units; inf and NaN count as 0."""
    known = seconds if isfinite(seconds) else 0
    minutes, rest = divmod(max(0, int(known)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
