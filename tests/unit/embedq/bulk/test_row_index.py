"""Tests of the index that finds reusable rows for an update."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from embedq.bulk.run import text_hash
from embedq.bulk.update import TO_EMBED, RowIndex
from embedq.jobs.batches import Document

ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=12)


@contextmanager
def index(
    folder: Path, rows: Sequence[tuple[str | int, str]], status: str = "ok"
) -> Iterator[RowIndex]:
    """Open an index of rows (id, text)."""
    items = folder / "items.jsonl"
    with items.open("w") as out:
        for row, (name, text) in enumerate(rows):
            item = {"row": row, "id": name, "status": status, "text_hash": text_hash(text)}
            out.write(json.dumps(item) + "\n")
    (folder / "index").unlink(missing_ok=True)
    with closing(RowIndex(folder / "index", items)) as opened:
        yield opened


def find(rows: RowIndex, name: str | int, text: str, *, named: bool = True) -> int:
    return rows.find(Document(name, text, named), text_hash(text))


def test_named_document_is_found_by_id_and_text(tmp_path: Path) -> None:
    with index(tmp_path, [("a", "x"), (7, "y")]) as rows:
        assert find(rows, "a", "x") == 0
        assert find(rows, 7, "y") == 1
        assert find(rows, "a", "y") == TO_EMBED
        assert find(rows, "b", "x") == TO_EMBED


def test_unnamed_document_is_found_by_its_text_alone(tmp_path: Path) -> None:
    with index(tmp_path, [(1, "x"), (2, "y")]) as rows:
        assert find(rows, 9, "y", named=False) == 1
        assert find(rows, 1, "z", named=False) == TO_EMBED


def test_failed_row_is_superseded_but_never_reused(tmp_path: Path) -> None:
    with index(tmp_path, [("a", "x")], status="failed") as rows:
        assert find(rows, "a", "x") == TO_EMBED
        assert rows.supersede("a")
        assert rows.count_unused() == 0


def test_equal_rows_are_used_in_turn_and_then_shared(tmp_path: Path) -> None:
    with index(tmp_path, [(1, "x"), (2, "x"), (3, "y")]) as rows:
        found = [find(rows, n, "x", named=False) for n in range(3)]

        assert set(found[:2]) == {0, 1}
        assert found[2] in (0, 1)
        assert rows.count_unused() == 1


def test_superseded_row_can_still_be_reused(tmp_path: Path) -> None:
    with index(tmp_path, [("a", "x")]) as rows:
        assert rows.supersede("a")
        assert find(rows, "a", "x") == 0
        assert not rows.supersede("a")


def test_reset_marks_all_rows_unused(tmp_path: Path) -> None:
    with index(tmp_path, [("a", "x"), ("b", "y")]) as rows:
        find(rows, "a", "x")
        rows.supersede("b")
        assert rows.count_unused() == 0

        rows.reset()

        assert rows.count_unused() == 2


@given(before=ROWS, after=ROWS)
def test_counts_of_reused_changed_and_removed_rows_are_consistent(
    before: list[tuple[str, str]], after: list[tuple[str, str]]
) -> None:
    with tempfile.TemporaryDirectory() as folder, index(Path(folder), before) as rows:
        reused = changed = 0
        for name, text in after:
            row = find(rows, name, text)
            if row == TO_EMBED:
                changed += rows.supersede(name)
            else:
                reused += 1
                assert before[row] == (name, text)
        removed = rows.count_unused()

        assert removed >= len(before) - reused - changed
        assert removed <= len(before) - len({*before} & {*after})


def test_many_equal_texts_are_found_in_linear_time(tmp_path: Path) -> None:
    n = 20_000
    with index(tmp_path, [(i, "same") for i in range(n)]) as rows:
        began = time.process_time()
        found = {find(rows, i, "same", named=False) for i in range(n)}

        assert len(found) == n
        assert rows.count_unused() == 0
        assert time.process_time() - began < 10  # seconds of CPU; a scan per text takes minutes
