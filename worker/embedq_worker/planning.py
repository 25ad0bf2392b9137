"""Which texts share a token batch. Pure: the plan depends on lengths alone, never on timing."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_worker.packing import Form, Indices, RowForm

#: Padded tokens below which a token batch is not shrunk further: smaller ones cost more in calls
#: than they win in balance.
MIN_BUDGET: Final = 128


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
