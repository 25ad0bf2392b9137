"""Inputs and outputs of bulk runs, and runs that are killed.

What tests of whole runs share: inputs, the command as a child process, outputs read back.
"""

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
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Notes:
    """A display that keeps what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def update(self, progress: RunProgress) -> None:
        """Ignore progress."""

    def note(self, message: str) -> None:
        """Keep a sentence."""
        self.notes.append(message)


def embed(
    client: Client,
    inputs: Path | Iterable[str],
    output: Path,
    *,
    update: bool = False,
    display: Notes | None = None,
    **options: Any,
) -> RunSummary:
    """Do in this process what `embedq embed` does; options are those of Request."""
    names = (os.fspath(inputs),) if isinstance(inputs, Path) else tuple(inputs)
    run = UpdateRun if update else EmbedRun
    request = EmbedRequest(names, output, **options)
    return run(client, request, display or Notes(), time.monotonic()).run()


def safe_rows(output: Path) -> int:
    """Return how many rows the manifest beside an output vouches for."""
    manifest = Manifest.load(manifest_path(output))
    return manifest.rows if manifest is not None else 0


def vectors(output: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Load the vectors of an npy output."""
    return np.asarray(np.load(output))


def items(output: Path) -> Documents:
    """Load the sidecar of an npy output."""
    return [json.loads(line) for line in sidecar_path(output).read_text().splitlines()]


def rows(output: Path) -> Documents:
    """Load an output of any format as one dict a row, its vector as a list or None."""
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
    """Return the names of everything in the folder of an output."""
    return {path.name for path in output.parent.iterdir()}


class Work:
    """Counts the texts that a worker with one child computes from here on, by its log."""

    def __init__(self, client: Client, worker: WorkerProcess) -> None:
        self._client, self._worker = client, worker
        self._others = {self._settle()} | {_job(line) for line in worker.lines("batch_done")}

    def texts(self) -> int:
        """Return how many texts it has computed."""
        self._others.add(self._settle())
        lines = [
            line for line in self._worker.lines("batch_done") if _job(line) not in self._others
        ]
        return sum(int(line.split("texts=")[1].split()[0]) for line in lines)

    def _settle(self) -> str:
        """Give the worker a text of ours: once it has done that, all before it is in the log."""
        job = self._client.submit(["settle"])
        job.wait(timeout_s=DEADLINE_S)
        return job.id


class Killed(BaseException):
    """Stands for a kill -9 in this process."""


@contextmanager
def killed_at_step(n: int) -> Iterator[None]:
    """End a run in this process before its n-th fsync, rename or deletion of a file.

    Nothing of these happens after the first that was refused, as after a kill; the lock alone is
    given back, which the system does for the dead.
    """
    done = 0

    def mortal(step: Callable[..., Any]) -> Callable[..., Any]:
        def act(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            if str(args[0]).endswith(".lock"):
                return step(*args, **kwargs)
            done += 1
            if done >= n:
                raise Killed
            return step(*args, **kwargs)

        return act

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", mortal(os.fsync))
        patch.setattr(Path, "replace", mortal(Path.replace))
        patch.setattr(Path, "unlink", mortal(Path.unlink))
        yield


def unfinished(client: Client, source: Path, output: Path, *, step: int = 10) -> None:
    """Leave an output as a run does that is killed in its middle."""
    with killed_at_step(step), pytest.raises(Killed):
        embed(client, source, output)
    assert safe_rows(output) > 0


def _job(line: str) -> str:
    return line.split("job=")[1].split()[0]
