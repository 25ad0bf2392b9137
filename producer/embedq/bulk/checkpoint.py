"""What an output already holds: the manifest beside it, and the spool that a kill -9 cannot spoil.

A run writes vectors and items into two spool files and, after fsync, notes in the manifest how far
they are good. The same command finds the manifest, cuts the spools to that length and goes on. When
everything is there, the manifest says so before the spools become the output, so that a run which
was killed between two renames is finished by the next.
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
from embedq.protocol.values import DESCRIPTIONS, Vectors

#: Version of the manifest; a newer one is refused.
MANIFEST_VERSION: Final = 1


#: Bytes of an npy header; room for any shape, and the data behind it is aligned to 64.
NPY_HEADER_BYTES: Final = 128


#: What a run did to the texts so far; the keys of Manifest.counts.
COUNTS: Final = ("ok", "failed", "truncated", "rerouted")


#: What may change under an output: the model is known by its identity, wherever it lies, and a line
#: that is now skipped shows in the digest if it was a document before.
IGNORED_KEYS: Final = frozenset({"model_label", "bad_lines"})


@dataclass(slots=True)
class Manifest:
    """The named file beside an output: what it was made of, and how far it is.

    Attributes:
        settings: everything that shapes vectors or the split; a change is refused by name.
        inputs: the input files and how they were read; a change is refused by name.
        engine: device, engine and precision of a local run; empty for a fleet.
        job: id of the running job, so that the next run can cancel what is left of it.
        embedded: every row is safe in the spools, or in the output already.
        complete: the output is finished.
        rows, batches: how much of it is safe on disk.
        skipped: bad lines left out so far.
        digest: chain over ids and texts of the safe batches; a changed input breaks it.
        vectors_bytes, items_bytes: safe length of the two spools.
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
        """What the vectors of the output are."""
        return Dtype(self.settings.get("dtype", Dtype.FLOAT32))

    def save(self, path: Path) -> None:
        """Replace the file, safely on disk when this returns."""
        temporary = path.with_name(path.name + ".tmp")
        with writing(path), temporary.open("w", encoding="utf-8") as out:
            json.dump(asdict(self), out, indent=1)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
            temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """Read the file; None if there is none.

        Raises:
            InputError: it is damaged, or of a newer version.
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
                f"{path}: not a manifest that can be read. Start over with --restart."
            ) from error

    def check_compatible(self, now: Manifest) -> None:
        """Compare with what the command asks for now.

        Raises:
            InputChanged: a setting or an input differs; names it, then and now.
        """
        for part, before, after in (
            ("setting", self.settings, now.settings),
            ("input", self.inputs, now.inputs),
            ("engine", self.engine, now.engine or self.engine),
        ):
            advice = "Use the former, or start over with --restart."
            if part == "input" and self.complete:
                advice = f"{advice[:-1]}, or bring the output up to date with --update."
            for key in sorted((before.keys() | after.keys()) - IGNORED_KEYS):
                if before.get(key) != after.get(key):
                    raise InputChanged(
                        f"The output was begun with {part} {key} = {_shown(before.get(key))}; now "
                        f"it is {_shown(after.get(key))}. {advice}"
                    )


def manifest_path(output: Path) -> Path:
    """Return the path of an output's manifest."""
    return output.with_name(output.name + ".embedq.json")


class InputChanged(InputError):
    """The input or a setting is not the one that the output was made of."""

    code = "input_changed"


@contextmanager
def lock_output(output: Path) -> Iterator[None]:
    """Keep every other embedq off an output while the block lasts.

    Raises:
        InputError: another one is writing this output, or its folder cannot be written.
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
                f"{output}: another embedq is writing this output. Wait for it, or name another."
            ) from None
        # Its last owner may have deleted the file after we opened it; then it keeps nobody off.
        if _is_at(lock.fileno(), path):
            break
        lock.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


class PartialFiles:
    """The two files that rows wait in.

    Attributes:
        vectors_path: an npy file already, whose header is filled in at the end.
        items_path: one JSON object a line.
    """

    def __init__(self, output: Path) -> None:
        """Name the spools of an output."""
        self.vectors_path = output.with_name(output.name + ".vectors.partial")
        self.items_path = output.with_name(output.name + ".items.partial")

    def require_whole(self, manifest: Manifest) -> None:
        """Check that the spools that are left are as long as their manifest says.

        Raises:
            InputError: one is not.
        """
        for path, length in (
            (self.vectors_path, manifest.vectors_bytes),
            (self.items_path, manifest.items_bytes),
        ):
            if path.exists() and path.stat().st_size < length:
                raise _too_short(path)

    def remove(self) -> None:
        """Delete what is left of the spools; while the vectors are there, both are needed."""
        self.vectors_path.unlink(missing_ok=True)
        self.items_path.unlink(missing_ok=True)


class PartialWriter(PartialFiles):
    """The spools, open for writing by the one who claimed the output."""

    def __init__(self, output: Path, manifest: Manifest) -> None:
        """Open the spools of an output and cut them to what the manifest vouches for.

        Raises:
            InputError: they cannot be written, or are shorter than the manifest says.
        """
        super().__init__(output)
        fresh = manifest.batches == 0
        self._description = DESCRIPTIONS[manifest.dtype]
        self._vectors = _open_at(self.vectors_path, 0 if fresh else manifest.vectors_bytes)
        try:
            self._items = _open_at(self.items_path, 0 if fresh else manifest.items_bytes)
        except InputError:
            self._vectors.close()
            raise
        if fresh:
            self._vectors.write(npy_header(0, 1))

    def write(self, vectors: Vectors, lines: Sequence[str]) -> None:
        """Append rows, float32 [n, D], and their n items."""
        with writing(self.vectors_path):
            self._vectors.write(vectors.astype(self._description, copy=False).tobytes())
            self._items.write("".join(lines).encode())

    def sync(self) -> tuple[int, int]:
        """Force everything to disk and return the length of both spools in bytes."""
        for spool in (self._vectors, self._items):
            with writing(self.vectors_path):
                spool.flush()
                os.fsync(spool.fileno())
        return self._vectors.tell(), self._items.tell()

    def close(self) -> None:
        """Close the spools; what was not synced may be lost."""
        for spool in (self._vectors, self._items):
            with writing(self.vectors_path):
                spool.close()


def npy_header(rows: int, dim: int, dtype: Dtype = Dtype.FLOAT32) -> bytes:
    """Return the header of a [rows, dim] npy file, version 1.0, always of one length.

    Source: numpy.lib.format, "Format Version 1.0".
    """
    shape = (
        f"{{'descr': '{DESCRIPTIONS[dtype]}', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    )
    body = shape.ljust(NPY_HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body.encode("ascii")


def _open_at(path: Path, length: int) -> BinaryIO:
    with writing(path):
        spool = path.open("r+b" if path.exists() else "w+b")
        if spool.seek(0, os.SEEK_END) < length:
            spool.close()
            raise _too_short(path)
        spool.truncate(length)
        spool.seek(length)
        return spool


def _too_short(path: Path) -> InputError:
    return InputError(
        f"{path}: shorter than its manifest says; something else cut it. Start over with --restart."
    )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _shown(value: object) -> str:
    return "nothing" if value is None else json.dumps(value)
