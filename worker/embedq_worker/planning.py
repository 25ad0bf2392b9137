"""Which texts share a token batch. Pure: the plan depends on lengths alone, never on timing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from embedq_worker.packing import Form, Indices, RowForm

#: Padded tokens below which a token batch is not shrunk further: smaller ones cost more in calls
#: than they win in balance.
MIN_BUDGET: Final = 128
#: Share of a row that must be filled before it goes ahead of the rest of its batch.
FULL: Final = 0.98


def plan_padded(lengths: npt.ArrayLike, token_budget: int, streams: int = 1) -> list[Indices]:
    """Group texts of like length so that each group fills a token batch without much padding.

    The longest go first; equal lengths keep their order, so the plan depends on nothing but its
    arguments. A text longer than the budget goes alone.

    Args:
        lengths: tokens of each text.
        token_budget: most padded tokens in one group.
        streams: groups that will run at once at the end; the last groups shrink so that these
            streams finish together. 1 shrinks none.

    Returns:
        For each group the indices of its texts, longest first.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    remaining = int(sizes.sum())
    groups = []
    at = 0
    while at < len(order):
        budget = token_budget
        if streams > 1:
            # A share of half of what each stream has left: big groups first, small ones last.
            budget = min(budget, max(MIN_BUDGET, remaining // (2 * streams)))
        longest = max(1, int(sizes[order[at]]))
        group = order[at : at + max(1, budget // longest)]
        remaining -= int(sizes[group].sum())
        groups.append(group)
        at += len(group)
    return groups


def plan_packed(lengths: npt.ArrayLike, form: RowForm) -> list[Indices]:
    """Share rows among texts by best fit decreasing: each goes where it leaves least room.

    Equal lengths keep their order, so the plan depends on nothing but its arguments.

    Args:
        lengths: tokens of each text, at most the row's width.
        form: packed rows of one width.

    Returns:
        For each row the indices of its texts, longest first.

    Raises:
        ValueError: a text does not fit a row; texts are cut before, never here.
    """
    sizes = np.asarray(lengths, np.int64)
    (width,) = form.widths
    if sizes.max(initial=0) > width:
        raise ValueError(f"A text has {sizes.max()} tokens; a row takes {width}.")
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]
    rooms = 0  # bit r: some row has room for r tokens; finds the best fit without a search
    for text in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[text])
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(text)
        if len(rows[row]) < form.segments(width):
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return [np.array(row, np.intp) for row in rows]


@dataclass(frozen=True, slots=True)
class Pace:
    """How many texts are tokenized at a time, from the first chunk of a batch to its last.

    Attributes:
        first: small, for the engine waits for it.
        growth: how many times larger each next chunk may be.
        most: texts of any chunk; larger ones are sorted and packed with less waste.
        last: what the chunks shrink to at the end, by halves, so that little is left to encode once
            the engine is done.
    """

    first: int
    growth: int
    most: int
    last: int

    def sizes(self, n: int) -> list[int]:
        """Cut n texts into chunks."""
        sizes: list[int] = []
        left, size = n, self.first
        while left:
            sizes.append(min(left, size, max(self.last, left // 2)))
            left -= sizes[-1]
            size = min(self.most, self.growth * sizes[-1])
        return sizes


#: For a device that takes thousands of texts a second: 32 are tokenized in 3 to 5 ms, and no chunk
#: takes longer than the device needs for the one before.
FAST: Final = Pace(first=32, growth=2, most=512, last=64)
#: For an engine on the CPU, which takes hundreds: short waits matter less to it than padding. 512
#: docstrings fill 0.974 of their token batches so, as in chunks of 256, and the first wait is half.
STEADY: Final = Pace(first=128, growth=4, most=512, last=512)


class Window(NamedTuple):
    """What is packed of the texts at hand.

    Attributes:
        rows: for each row the indices of its texts.
        kept: indices of texts that wait for company.
    """

    rows: list[Indices]
    kept: Indices


def plan_window(lengths: npt.ArrayLike, form: RowForm, n_waiting: int, *, last: bool) -> Window:
    """Assign the texts at hand to rows, and keep those for later whose rows are not full yet.

    Best fit wants every length, the engine wants its first row at once. So a row goes as soon as it
    is full enough; a text waits for one more window at most.

    Args:
        lengths: tokens of each text.
        form: static rows.
        n_waiting: the first texts, which have waited once.
        last: nothing more will come.
    """
    rows = plan_rows(lengths, form)
    if last or form.form is not Form.PACKED:
        return Window(rows, np.empty(0, np.intp))
    sizes = np.asarray(lengths, np.int64)
    enough = FULL * form.widths[0]
    full = [sizes[row].sum() >= enough or row.min() < n_waiting for row in rows]
    kept = [row for row, go in zip(rows, full, strict=True) if not go]
    going = [row for row, go in zip(rows, full, strict=True) if go]
    return Window(going, np.sort(np.concatenate([np.empty(0, np.intp), *kept])))


def plan_rows(lengths: npt.ArrayLike, form: RowForm) -> list[Indices]:
    """Assign texts to static rows; buckets take one each, longest first."""
    if form.form is Form.PACKED:
        return plan_packed(lengths, form)
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    return [order[at : at + 1] for at in range(len(order))]


def seat_last(
    rows: list[Indices], lengths: npt.ArrayLike, form: RowForm, rider: int
) -> list[Indices]:
    """Give one more text a seat in the last row, which is made the one with most room.

    Static rows cost the same however full they are, so a seat is free wherever some row has room;
    only where none has is there a row more.

    Args:
        rows: of a plan.
        lengths: tokens of each text, the rider included.
        form: of the rows.
        rider: index of the text to seat.
    """
    sizes = np.asarray(lengths, np.int64)
    if rows and form.form is Form.PACKED:
        (width,) = form.widths
        loads = [int(sizes[row].sum()) for row in rows]
        emptiest = loads.index(min(loads))
        row = rows[emptiest]
        if loads[emptiest] + sizes[rider] <= width and len(row) < form.segments(width):
            others = rows[:emptiest] + rows[emptiest + 1 :]
            return [*others, np.append(row, rider)]
    return [*rows, np.array([rider], np.intp)]
