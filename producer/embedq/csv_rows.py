"""CSV rows with their line numbers; a quote that is never closed costs its own line only."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterable, Iterator


def csv_rows(lines: Iterable[str]) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Yield each row, or what is wrong with it, with the number of its first line from 1.

    Behind a broken row reading goes on at its second line: with an open quote the row has swallowed
    many good ones, up to csv.field_size_limit characters. A longer line is broken in any case.
    """
    source = iter(lines)
    again: deque[str] = deque()
    taken: list[str] = []

    def supply() -> Iterator[str]:
        while True:
            line = again.popleft() if again else next(source, None)
            if line is None:
                return
            taken.append(line)
            if len(line) > csv.field_size_limit():
                raise csv.Error(f"line longer than {csv.field_size_limit():,} characters")
            yield line

    rows = csv.reader(supply(), strict=True)
    number = 1
    while True:
        taken.clear()
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, error
            again.extendleft(reversed(taken[1:]))
            rows = csv.reader(supply(), strict=True)
            number += 1
            continue
        yield number, row
        number += len(taken)
