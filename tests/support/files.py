"""Write the inputs of bulk runs, run and interrupt them, and read their outputs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.redis import DEADLINE_S
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.bulk.checkpoint import Manifest, manifest_path
from embedq.bulk.request import EmbedRequest, RunProgress, RunSummary
from embedq.bulk.run import EmbedRun
from embedq.bulk.update import UpdateRun
from embedq.bulk.writers import sidecar_path

#: Small batches and a small window, so that a few hundred texts are many batches.
SMALL = {"batch_texts": 32, "max_in_flight": 8}
Documents = list[dict[str, Any]]


def documents(n: int) -> Documents:
    """Return n documents of different lengths."""
    return [{"id": f"d{i}", "text": f"document {i} {'word ' * (i % 40)}"} for i in range(n)]


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class RecordedNotes:
    """A display that records the notes of a run."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def update(self, progress: RunProgress) -> None:
        pass

    def note(self, message: str) -> None:
        self.notes.append(message)


def embed(
    client: Client,
    inputs: Path | Iterable[str],
    output: Path,
    *,
    update: bool = False,
    display: RecordedNotes | None = None,
    **options: Any,
) -> RunSummary:
    """Run `embedq embed` in this process; options are those of EmbedRequest."""
    names = (os.fspath(inputs),) if isinstance(inputs, Path) else tuple(inputs)
    run = UpdateRun if update else EmbedRun
    request = EmbedRequest(names, output, **options)
    return run(client, request, display or RecordedNotes(), time.monotonic()).run()


def safe_rows(output: Path) -> int:
    """Return how many rows the manifest of an output confirms."""
    manifest = Manifest.load(manifest_path(output))
    return manifest.rows if manifest is not None else 0


def vectors(output: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(np.load(output))


def items(output: Path) -> Documents:
    return [json.loads(line) for line in sidecar_path(output).read_text().splitlines()]


def rows(output: Path) -> Documents:
    """Load an output of any format as one dict per row, with the vector as a list or None."""
    if output.suffix == ".jsonl":
        return [json.loads(line) for line in output.read_text().splitlines()]
    if output.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        found: Documents = parquet.read_table(output).to_pylist()
        return found
    return [
        {**item, "vector": row.tolist() if item["status"] == "ok" else None}
        for item, row in zip(items(output), vectors(output), strict=True)
    ]


def files_beside(output: Path) -> set[str]:
    return {path.name for path in output.parent.iterdir()}


class Work:
    """Counts the texts that a worker computes from now on, from its log."""

    def __init__(self, client: Client, worker: WorkerProcess) -> None:
        self._client, self._worker = client, worker
        self._other_jobs = {self._settle()} | {_job(line) for line in worker.lines("batch_done")}

    def texts(self) -> int:
        self._other_jobs.add(self._settle())
        lines = [
            line for line in self._worker.lines("batch_done") if _job(line) not in self._other_jobs
        ]
        return sum(int(line.split("texts=")[1].split()[0]) for line in lines)

    def _settle(self) -> str:
        """Embed one more text: once that is done, everything before it is in the log."""
        job = self._client.submit(["settle"])
        job.wait(timeout_s=DEADLINE_S)
        return job.id


class Killed(BaseException):
    """Stands for SIGKILL in this process."""


@contextmanager
def killed_at_step(n: int) -> Iterator[None]:
    """Raise Killed at the n-th fsync, rename or deletion of a file, and at every later one.

    The lock file is exempt, because the system releases the lock of a killed process.
    """
    done = 0

    def interrupted(step: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if str(args[0]).endswith(".lock"):
                return step(*args, **kwargs)
            done += 1
            if done >= n:
                raise Killed
            return step(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", interrupted(os.fsync))
        patch.setattr(Path, "replace", interrupted(Path.replace))
        patch.setattr(Path, "unlink", interrupted(Path.unlink))
        yield


def unfinished(client: Client, source: Path, output: Path, *, step: int = 10) -> None:
    """Leave an output as a run does that is killed half-way."""
    with killed_at_step(step), pytest.raises(Killed):
        embed(client, source, output)
    assert safe_rows(output) > 0


def _job(line: str) -> str:
    return line.split("job=")[1].split()[0]
