"""The rows of an output by id and by text, so that an update finds those that it can keep."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Final

from embedq.errors import InputError
from embedq.files import Document

#: Stands for a row that is not there: the document has to be embedded.
TO_EMBED: Final = -1
#: What became of a row of the old output; rows that may still be given away come first.
UNUSED, SUPERSEDED, KEPT = 0, 1, 2


class RowIndex:
    """Where each document of an output is, by id and by hash of its text; on disk."""

    def __init__(self, path: Path, items: Path) -> None:
        """Read the items of an output.

        Args:
            path: of the index, thrown away with its folder.
            items: one JSON object a line, in row order.

        Raises:
            InputError: the items are damaged.
        """
        self._db = sqlite3.connect(path)
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE rows (row INTEGER PRIMARY KEY, id BLOB, hash TEXT, use INT)")
        try:
            with items.open(encoding="utf-8") as lines:
                self._db.executemany("INSERT INTO rows VALUES (?, ?, ?, 0)", map(_index_row, lines))
        except (ValueError, KeyError, TypeError, sqlite3.IntegrityError) as error:
            raise InputError(
                f"{items}: is not what embedq wrote. Start over with --restart."
            ) from error
        # The use comes last in both, so that the free row of many equal ones is found at once.
        self._db.execute("CREATE INDEX by_id ON rows (id, hash, use)")
        self._db.execute("CREATE INDEX by_hash ON rows (hash, use)")

    def close(self) -> None:
        """Close the index."""
        self._db.close()

    def forget_use(self) -> None:
        """Start counting anew."""
        self._db.execute("UPDATE rows SET use = ? WHERE use != ?", (UNUSED, UNUSED))

    def count_unused(self) -> int:
        """Count the rows that no document was found in, nor superseded."""
        (n,) = self._db.execute("SELECT COUNT(*) FROM rows WHERE use = ?", (UNUSED,)).fetchone()
        return int(n)

    def find(self, document: Document, digest: str) -> int:
        """Return the row that holds this text under this id, or TO_EMBED.

        A document that the file gives no id is found by its text alone, wherever it moved. Equal
        documents are given equal rows in turn, and share them when there are too few.
        """
        if not digest:
            return TO_EMBED
        if document.named:
            return self._use("id = ? AND hash = ?", (_key(document.id), digest), KEPT)
        return self._use("hash = ?", (digest,), KEPT)

    def supersede(self, name: str | int) -> bool:
        """Give up a row of this id for a document that takes its place; False if there is none."""
        return self._use("id = ? AND use = 0", (_key(name),), SUPERSEDED) != TO_EMBED

    def _use(self, where: str, values: tuple[str | bytes, ...], use: int) -> int:
        query = f"SELECT row, use FROM rows WHERE {where} ORDER BY use LIMIT 1"
        found = self._db.execute(query, values).fetchone()
        if found is None:
            return TO_EMBED
        row, before = found
        if use != before:
            self._db.execute("UPDATE rows SET use = ? WHERE row = ?", (use, row))
        return int(row)


def _key(name: str | int) -> bytes:
    return str(name).encode(errors="surrogatepass")


def _index_row(line: str) -> tuple[int, bytes, str]:
    item = json.loads(line)
    # A failed text has no vector worth keeping: an empty hash is never found.
    digest = item["text_hash"] if item["status"] == "ok" else ""
    return item["row"], _key(item["id"]), digest
