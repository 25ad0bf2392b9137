"""Which texts share a token batch. Pure: the plan depends on lengths alone, never on timing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from embedq_worker.engines.base import SIMD_WIDTH, RowFormat, RowSpec, round_up_to_simd
from embedq_worker.inference.packing import Indices

#: Padded tokens below which a token batch is not shrunk further: smaller ones cost more in calls
#: than they win in balance.
MIN_BUDGET: Final = 128


#: Share of a row that must be filled before it goes ahead of the rest of its batch.
FULL: Final = 0.98


#: Share of a row on the CPU that texts must fill to be better off in it than in rows of their own.
WORTH_SHARING: Final = 0.9


#: Tokens beyond whole LANES from which filling up the row costs less than the rest one by one.
LONG_TAIL: Final = 12


#: What a token costs on the CPU beside its products, as a share of these: for each token of its
#: row, for a row with a tail, and for each token of the tail. Between what f32 and bf16 measured
#: with all-MiniLM-L6-v2 on two Zen 5 cores, 2026-11-27; used to compare plans, so their relation
#: counts.
ATTENTION: Final = 0.0007


TAIL: Final = 0.03


TAIL_TOKEN: Final = 0.006


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
    return list(_alone(order, sizes, _Shrinking(token_budget, int(sizes.sum()), streams)))


class _Shrinking:
    """The budget of the next group: as given, and less where streams are to finish together."""

    def __init__(self, token_budget: int, n_tokens: int, streams: int) -> None:
        self._budget, self._remaining, self._streams = token_budget, n_tokens, streams

    def rows_of(self, width: int) -> int:
        """Return how many rows of this width the next group may have; one always."""
        budget = self._budget
        if self._streams > 1:
            # A share of half of what each stream has left: big groups first, small ones last.
            budget = min(budget, max(MIN_BUDGET, self._remaining // (2 * self._streams)))
        return max(1, budget // width)

    def take(self, n_tokens: int) -> None:
        """Note that a group took these tokens of texts."""
        self._remaining -= n_tokens


class Group(NamedTuple):
    """One token batch to come.

    Attributes:
        width: tokens of each of its rows.
        rows: for each row the indices of its texts.
    """

    width: int
    rows: list[Indices]

    @property
    def cost(self) -> float:
        """Say about how long it takes on the CPU, in tokens."""
        tail = self.width % SIMD_WIDTH
        beside = ATTENTION * self.width + (TAIL + TAIL_TOKEN * tail if tail else 0.0)
        return len(self.rows) * self.width * (1.0 + beside)


def plan_shared(
    lengths: npt.ArrayLike, form: RowSpec, token_budget: int, streams: int = 1
) -> list[Group]:
    """Let texts share rows where they fill them, and give the others rows of their own.

    Rows of a few widths that are multiples of LANES spare the CPU the padding, the tails and a new
    shape for each token batch. Where lengths do not fit together, sorting them all is better.

    Args:
        lengths: tokens of each text, at most the widest row.
        form: shared rows.
        token_budget: most padded tokens in one group; the tokens that fill up LANES are not
            counted.
        streams: as for plan_padded.

    Returns:
        Shared rows first, the widest at the front; then the others, longest first.
    """
    sizes = np.asarray(lengths, np.int64)
    shared, alone = _share(sizes, form)
    plans = [(shared, alone), ({}, np.arange(len(sizes)))] if shared else [(shared, alone)]
    made = [_groups(*plan, sizes, token_budget, streams) for plan in plans]
    return min(made, key=lambda groups: sum(group.cost for group in groups))


def _share(sizes: npt.NDArray[np.int64], form: RowSpec) -> tuple[dict[int, list[Indices]], Indices]:
    """Return the rows of each width that are worth sharing, and the texts that are in none."""
    by_width: dict[int, list[Indices]] = {}
    alone: list[Indices] = [np.empty(0, np.intp)]
    for row in plan_packed(sizes, form):
        width = form.width_for(int(sizes[row[0]]))
        if sizes[row].sum() >= WORTH_SHARING * width:
            by_width.setdefault(width, []).append(row)
        else:
            alone.append(row)
    return by_width, np.sort(np.concatenate(alone))


def _groups(
    shared: dict[int, list[Indices]],
    alone: Indices,
    sizes: npt.NDArray[np.int64],
    token_budget: int,
    streams: int,
) -> list[Group]:
    shrinking = _Shrinking(token_budget, int(sizes.sum()), streams)
    groups = []
    for width, rows in sorted(shared.items(), reverse=True):
        at = 0
        while at < len(rows):
            group = rows[at : at + shrinking.rows_of(width)]
            shrinking.take(int(sizes[np.concatenate(group)].sum()))
            groups.append(Group(width, group))
            at += len(group)
    longest_first = alone[np.argsort(-sizes[alone], kind="stable")]
    for texts in _alone(longest_first, sizes, shrinking):
        width = int(sizes[texts[0]])
        filled_up = round_up_to_simd(width) if width % SIMD_WIDTH >= LONG_TAIL else width
        groups.append(Group(filled_up, list(texts[:, None])))
    return groups


def _alone(
    longest_first: Indices, sizes: npt.NDArray[np.int64], shrinking: _Shrinking
) -> Iterator[Indices]:
    """Group texts that have a row each."""
    at = 0
    while at < len(longest_first):
        width = max(1, int(sizes[longest_first[at]]))
        texts = longest_first[at : at + shrinking.rows_of(width)]
        shrinking.take(int(sizes[texts].sum()))
        yield texts
        at += len(texts)


def plan_packed(lengths: npt.ArrayLike, form: RowSpec) -> list[Indices]:
    """Share rows among texts by best fit decreasing: each goes where it leaves least room.

    Equal lengths keep their order, so the plan depends on nothing but its arguments.

    Args:
        lengths: tokens of each text, at most the row's width.
        form: packed or shared rows; a new one gets the smallest width that takes its first text.

    Returns:
        For each row the indices of its texts, longest first.

    Raises:
        ValueError: a text does not fit a row; texts are cut before, never here.
    """
    sizes = np.asarray(lengths, np.int64)
    widest = form.widths[-1]
    if sizes.max(initial=0) > widest:
        raise ValueError(f"A text has {sizes.max()} tokens; a row takes {widest}.")
    rows: list[list[int]] = []
    most: list[int] = []  # texts that each row has segments for
    with_room: list[list[int]] = [[] for _ in range(widest + 1)]
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
            room, row = form.width_for(size), len(rows)
            rows.append([])
            most.append(form.segments(room))
        rows[row].append(text)
        if len(rows[row]) < most[row]:
            with_room[room - size].append(row)
            rooms |= 1 << (room - size)
    return [np.array(row, np.intp) for row in rows]


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
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
NPU_CHUNKS: Final = ChunkSchedule(first=32, growth=2, most=512, last=64)


#: For an engine on the CPU, which takes hundreds: enough for it to begin with, and then all others
#: at once, for padding matters more to it than waits. Against 128 and then 512 at a time, 1.006 to
#: 1.007 times the speed for docstrings and 1.010 to 1.017 for titles (two Zen 4 cores, bf16 and
#: int8, measured 2026-11-28).
CPU_CHUNKS: Final = ChunkSchedule(first=32, growth=128, most=4096, last=4096)


class Window(NamedTuple):
    """What is packed of the texts at hand.

    Attributes:
        rows: for each row the indices of its texts.
        kept: indices of texts that wait for company.
    """

    rows: list[Indices]
    kept: Indices


def plan_window(lengths: npt.ArrayLike, form: RowSpec, n_waiting: int, *, last: bool) -> Window:
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
    if last or form.format is not RowFormat.PACKED:
        return Window(rows, np.empty(0, np.intp))
    sizes = np.asarray(lengths, np.int64)
    enough = FULL * form.widths[0]
    full = [sizes[row].sum() >= enough or row.min() < n_waiting for row in rows]
    kept = [row for row, go in zip(rows, full, strict=True) if not go]
    going = [row for row, go in zip(rows, full, strict=True) if go]
    return Window(going, np.sort(np.concatenate([np.empty(0, np.intp), *kept])))


def plan_rows(lengths: npt.ArrayLike, form: RowSpec) -> list[Indices]:
    """Assign texts to static rows; buckets take one each, longest first."""
    if form.format is RowFormat.PACKED:
        return plan_packed(lengths, form)
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    return [order[at : at + 1] for at in range(len(order))]


def place_canary(
    rows: list[Indices], lengths: npt.ArrayLike, form: RowSpec, canary: int
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
    if rows and form.format is RowFormat.PACKED:
        (width,) = form.widths
        loads = [int(sizes[row].sum()) for row in rows]
        emptiest = loads.index(min(loads))
        row = rows[emptiest]
        if loads[emptiest] + sizes[canary] <= width and len(row) < form.segments(width):
            others = rows[:emptiest] + rows[emptiest + 1 :]
            return [*others, np.append(row, canary)]
    return [*rows, np.array([canary], np.intp)]
