"""Checkpoints of `embedq embed`: the manifest and the partial files beside an output.

A run appends vectors and items to two partial files and, after fsync, records their safe length in
the manifest. The same command later cuts the partial files to that length and continues. The
manifest is marked `embedded` before the partial files are renamed to the output, so the next run
completes a rename that a kill interrupted.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Final

from embedq.errors import InputError, writing
from embedq.protocol.contract import Dtype
from embedq.protocol.values import NUMPY_DTYPES, Vectors

#: Version of the manifest; newer versions are refused.
MANIFEST_VERSION: Final = 1

#: Bytes of an npy header: fits any shape and aligns the data to 64 bytes.
NPY_HEADER_BYTES: Final = 128

#: Keys of Manifest.counts.
COUNTS: Final = ("ok", "failed", "truncated", "rerouted")

#: Settings that may change between runs. The model is compared by its identity, not its label; the
#: digest shows whether a line that is skipped now was a document before.
IGNORED_KEYS: Final = frozenset({"model_label", "bad_lines"})


class InputChanged(InputError):
    """The input or a setting differs from those that the output was made with."""

    code = "input_changed"


@dataclass(slots=True)
class Manifest:
    """Records the origin and the progress of an output, as JSON beside it.

    Attributes:
        settings: everything that shapes the vectors or the split into batches.
        inputs: the input files and how they are read.
        engine: device, engine and precision of a local run; empty for a fleet.
        job: id of the running job; the next run cancels it.
        embedded: every row is on disk, in the partial files or in the output.
        complete: the output is finished.
        rows, batches: number of each that is on disk.
        skipped: bad lines skipped so far.
        digest: hash over ids and texts of all batches on disk.
        vectors_bytes, items_bytes: length of the partial files at the last fsync.
        counts: outcomes so far.
        tokens: tokens embedded so far.
    """

    settings: dict[str, Any]
    inputs: dict[str, Any]
    engine: dict[str, str] = field(default_factory=dict)
    job: str = ""
    embedded: bool = False
    complete: bool = False
    rows: int = 0
    batches: int = 0
    skipped: int = 0
    digest: str = ""
    vectors_bytes: int = 0
    items_bytes: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    tokens: int = 0
    version: int = MANIFEST_VERSION

    @property
    def dtype(self) -> Dtype:
        """Type of the vectors in the output."""
        return Dtype(self.settings.get("dtype", Dtype.FLOAT32))

    def save(self, path: Path) -> None:
        """Replace the file atomically and fsync it."""
        temporary = path.with_name(path.name + ".tmp")
        with writing(path), temporary.open("w", encoding="utf-8") as out:
            json.dump(asdict(self), out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
            temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Read the file; return None if it does not exist.

        Raises:
            InputError: the file is damaged, or its version is newer.
        """
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["version"] > MANIFEST_VERSION:
                raise InputError(
                    f"{path}: manifest version {body['version']}; this embedq knows up to "
                    f"{MANIFEST_VERSION}. Upgrade embedq, or start over with --restart."
                )
            known = {f.name for f in fields(cls)}
            return cls(**{key: value for key, value in body.items() if key in known})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: this manifest cannot be read. Start over with --restart."
            ) from error

    def check_compatible(self, now: Manifest) -> None:
        """Check that a run with the settings and inputs of `now` may continue this output.

        Raises:
            InputChanged: a setting, an input or the engine differs; names it with both values.
        """
        for part, before, after in (
            ("setting", self.settings, now.settings),
            ("input", self.inputs, now.inputs),
            ("engine", self.engine, now.engine or self.engine),
        ):
            advice = "Use the earlier value, or start over with --restart."
            if part == "input" and self.complete:
                advice = f"{advice[:-1]}, or bring the output up to date with --update."
            for key in sorted((before.keys() | after.keys()) - IGNORED_KEYS):
                if before.get(key) != after.get(key):
                    raise InputChanged(
                        f"The output was started with {part} {key} = {_to_json(before.get(key))}; "
                        f"now it is {_to_json(after.get(key))}. {advice}"
                    )


def manifest_path(output: Path) -> Path:
    """Return the path of an output's manifest."""
    return output.with_name(output.name + ".embedq.json")


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Lock an output against other embedq processes while the block runs.

    Raises:
        InputError: another process holds the lock, or the folder cannot be written.
    """
    path = output.with_name(output.name + ".lock")
    while True:
        with writing(path):
            lock = path.open("wb")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise InputError(
                f"{output}: another embedq is writing this output. Wait until it ends, or name "
                "another output."
            ) from None
        # The previous owner may have deleted the file after we opened it; such a lock is void.
        if _is_same_file(lock.fileno(), path):
            break
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


class PartialFiles:
    """The two files beside an output that hold its rows until all are embedded.

    Attributes:
        vectors_path: an npy file; its header gets the number of rows at the end.
        items_path: one JSON object per line.
    """

    def __init__(self, output: Path) -> None:
        self.vectors_path = output.with_name(output.name + ".vectors.partial")
        self.items_path = output.with_name(output.name + ".items.partial")

    def check_lengths(self, manifest: Manifest) -> None:
        """Check that existing partial files have at least the length in their manifest.

        Raises:
            InputError: one is shorter.
        """
        for path, length in (
            (self.vectors_path, manifest.vectors_bytes),
            (self.items_path, manifest.items_bytes),
        ):
            if path.exists() and path.stat().st_size < length:
                raise _too_short(path)

    def remove(self) -> None:
        """Delete the partial files, vectors first: while these exist, both files are needed."""
        self.vectors_path.unlink(missing_ok=True)
        self.items_path.unlink(missing_ok=True)


class PartialWriter(PartialFiles):
    """Appends rows to the partial files of a locked output."""

    def __init__(self, output: Path, manifest: Manifest) -> None:
        """Open the partial files and cut them to the length in the manifest.

        Raises:
            InputError: a file cannot be written, or is shorter than the manifest says.
        """
        super().__init__(output)
        fresh = manifest.batches == 0
        self._description = NUMPY_DTYPES[manifest.dtype]
        self._vectors = _open_at(self.vectors_path, 0 if fresh else manifest.vectors_bytes)
        try:
            self._items = _open_at(self.items_path, 0 if fresh else manifest.items_bytes)
        except InputError:
            self._vectors.close()
            raise
        if fresh:
            self._vectors.write(npy_header(0, 1))

    def write(self, vectors: Vectors, lines: Sequence[str]) -> None:
        """Append vectors, float32 [n, D], and their n items."""
        with writing(self.vectors_path):
            self._vectors.write(vectors.astype(self._description, copy=False).tobytes())
            self._items.write("".join(lines).encode())

    def sync(self) -> tuple[int, int]:
        """Flush both files to disk and return their lengths in bytes: vectors, items."""
        with writing(self.vectors_path):
            for file in (self._vectors, self._items):
                file.flush()
                os.fsync(file.fileno())
        return self._vectors.tell(), self._items.tell()

    def close(self) -> None:
        """Close both files without fsync."""
        with writing(self.vectors_path):
            self._vectors.close()
            self._items.close()


def npy_header(rows: int, dim: int, dtype: Dtype = Dtype.FLOAT32) -> bytes:
    """Return the header of a [rows, dim] npy file, version 1.0, NPY_HEADER_BYTES long.

    Source: numpy.lib.format, "Format Version 1.0".
    """
    descr = NUMPY_DTYPES[dtype]
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    body = header.ljust(NPY_HEADER_BYTES - 11).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _open_at(path: Path, length: int) -> BinaryIO:
    with writing(path):
        file = path.open("r+b" if path.exists() else "w+b")
        if file.seek(0, os.SEEK_END) < length:
            file.close()
            raise _too_short(path)
        file.truncate(length)
        file.seek(length)
        return file


def _too_short(path: Path) -> InputError:
    return InputError(
        f"{path}: shorter than its manifest says; another program cut it. Start over with "
        "--restart."
    )


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _to_json(value: object) -> str:
    return "nothing" if value is None else json.dumps(value)
