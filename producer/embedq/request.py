"""What a person asked `embedq embed` to do. Light: read before Celery is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from embedq import outputs
from embedq.contract import Accuracy, OnLong, VectorSpec
from embedq.files import Document, Fields, expand, read
from embedq.report import Progress

if TYPE_CHECKING:
    from embedq.client import Client


@dataclass(frozen=True, slots=True)
class Request:
    """What the command was asked to do.

    Attributes:
        inputs, output: files; inputs may hold globs and ``-``.
        fields, format, skip_bad_lines: how the inputs are read.
        prompt_name, prompt, on_long, accuracy: as in Client.encode.
        restart: throw away what an earlier run left.
        pin_engine: refuse to go on with another engine than the one that began (a local run).
    """

    inputs: tuple[str, ...]
    output: Path
    fields: Fields = field(default_factory=Fields)
    format: str | None = None
    skip_bad_lines: bool = False
    prompt_name: str | None = None
    prompt: str | None = None
    on_long: OnLong | None = None
    accuracy: Accuracy | None = None
    restart: bool = False
    pin_engine: bool = False

    def files(self) -> list[str]:
        """Return the inputs with their globs expanded.

        Raises:
            InputError: as expand.
        """
        return expand(self.inputs, outputs.own_files(self.output))

    def documents(self, progress: Progress) -> Iterator[Document]:
        """Read the inputs."""
        return read(
            self.files(),
            fields=self.fields,
            format=self.format,
            skip_bad_lines=self.skip_bad_lines,
            reading=progress.reading,
        )

    def spec(self, client: Client) -> VectorSpec:
        """Return what will shape the vectors."""
        return client.spec(
            prompt_name=self.prompt_name,
            prompt=self.prompt,
            on_long=self.on_long,
            accuracy=self.accuracy,
        )
