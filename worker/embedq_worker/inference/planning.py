"""Assign texts to rows, rows to token batches, and the texts of a batch to chunks.

Plans depend on token counts only, never on timing, so that a batch computed twice gives the same
bytes. No runtime, clock or thread enters here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from embedq_worker.engines.base import SIMD_WIDTH, RowFormat, RowSpec, round_up_to_simd
from embedq_worker.inference.packing import Indices

#: Smallest budget of a token batch that shrinks at the end, in padded tokens. Smaller batches lose
#: more to the overhead of a call than better balance wins.
MIN_BUDGET: Final = 128

#: Fill ratio from which a packed row is computed before the rest of its batch is tokenized.
FULL: Final = 0.98

#: Fill ratio from which texts share a row on the CPU.
WORTH_SHARING: Final = 0.9

#: Tokens beyond a multiple of SIMD_WIDTH from which a row is padded to the next multiple.
LONG_TAIL: Final = 12

#: Cost of attention per token of row width, as a share of the cost of the matrix products. With
#: TAIL and TAIL_TOKEN it is used to compare plans, so only their ratios matter. Fitted to f32 and
#: bf16 of all-MiniLM-L6-v2.
ATTENTION: Final = 0.0007

#: Extra cost of a row whose width is not a multiple of SIMD_WIDTH, as the same share.
TAIL: Final = 0.03

#: Extra cost per token beyond that multiple, as the same share.
TAIL_TOKEN: Final = 0.006


def plan_padded(lengths: npt.ArrayLike, token_budget: int, streams: int = 1) -> list[Indices]:
    """Group texts of similar length, so that token batches are full and have little padding.

    Args:
        lengths: number of tokens of each text.
        token_budget: maximum number of padded tokens in a group; a longer text is a group alone.
        streams: number of concurrent inferences; the last groups shrink so that all streams
            finish together. 1 shrinks none.

    Returns:
        For each group the indices of its texts, longest first; equal lengths in order.
    """
    sizes = np.asarray(lengths, np.int64)
    order = np.argsort(-sizes, kind="stable")
    return list(_plan_single(order, sizes, _Budget(token_budget, int(sizes.sum()), streams)))


class _Budget:
    """Token budget of the next group, which shrinks where streams are to finish together."""

    def __init__(self, token_budget: int, n_tokens: int, streams: int) -> None:
        self._budget, self._remaining, self._streams = token_budget, n_tokens, streams

    def rows_of(self, width: int) -> int:
        budget = self._budget
        if self._streams > 1:
            # Half of each stream's share of the rest: large groups first, small ones last.
            budget = min(budget, max(MIN_BUDGET, self._remaining // (2 * self._streams)))
        return max(1, budget // width)

    def consume(self, n_tokens: int) -> None:
        self._remaining -= n_tokens


class Group(NamedTuple):
    """Rows of one token batch.

    Attributes:
        width: width of each row, in tokens.
        rows: for each row the indices of its texts.
    """

    width: int
    rows: list[Indices]

    @property
    def cost(self) -> float:
        """Estimate the time of this token batch on the CPU, in tokens."""
        tail = self.width % SIMD_WIDTH
        extra = ATTENTION * self.width + (TAIL + TAIL_TOKEN * tail if tail else 0.0)
        return len(self.rows) * self.width * (1.0 + extra)


def plan_shared(
    lengths: npt.ArrayLike, row_spec: RowSpec, token_budget: int, streams: int = 1
) -> list[Group]:
    """Put texts into shared rows where they fill them, and others into rows of their own.

    Shared rows of a few widths save padding and new shapes. Where lengths do not add up to these
    widths, sorting by length costs less; the cheaper of the two plans is returned.

    Args:
        lengths: number of tokens of each text, at most the widest row.
        row_spec: shared rows.
        token_budget: maximum number of padded tokens in a group, not counting tokens that round a
            width up to SIMD_WIDTH.
        streams: as for plan_padded.

    Returns:
        Groups of shared rows, widest first; then groups of single texts, longest first.
    """
    sizes = np.asarray(lengths, np.int64)
    shared, single = _share(sizes, row_spec)
    plans = [(shared, single), ({}, np.arange(len(sizes)))] if shared else [(shared, single)]
    grouped = [_groups(*plan, sizes, token_budget, streams) for plan in plans]
    return min(grouped, key=lambda groups: sum(group.cost for group in groups))


def _share(
    sizes: npt.NDArray[np.int64], row_spec: RowSpec
) -> tuple[dict[int, list[Indices]], Indices]:
    by_width: dict[int, list[Indices]] = {}
    single: list[Indices] = [np.empty(0, np.intp)]
    for row in plan_packed(sizes, row_spec):
        width = row_spec.width_for(int(sizes[row[0]]))
        if sizes[row].sum() >= WORTH_SHARING * width:
            by_width.setdefault(width, []).append(row)
        else:
            single.append(row)
    return by_width, np.sort(np.concatenate(single))


def _groups(
    shared: dict[int, list[Indices]],
    single: Indices,
    sizes: npt.NDArray[np.int64],
    token_budget: int,
    streams: int,
) -> list[Group]:
    budget = _Budget(token_budget, int(sizes.sum()), streams)
    groups = []
    for width, rows in sorted(shared.items(), reverse=True):
        at = 0
        while at < len(rows):
            group = rows[at : at + budget.rows_of(width)]
            budget.consume(int(sizes[np.concatenate(group)].sum()))
            groups.append(Group(width, group))
            at += len(group)
    longest_first = single[np.argsort(-sizes[single], kind="stable")]
    for texts in _plan_single(longest_first, sizes, budget):
        width = int(sizes[texts[0]])
        if width % SIMD_WIDTH >= LONG_TAIL:
            width = round_up_to_simd(width)
        groups.append(Group(width, list(texts[:, None])))
    return groups


def _plan_single(
    longest_first: Indices, sizes: npt.NDArray[np.int64], budget: _Budget
) -> Iterator[Indices]:
    at = 0
    while at < len(longest_first):
        width = max(1, int(sizes[longest_first[at]]))
        texts = longest_first[at : at + budget.rows_of(width)]
        budget.consume(int(sizes[texts].sum()))
        yield texts
        at += len(texts)


def plan_packed(lengths: npt.ArrayLike, row_spec: RowSpec) -> list[Indices]:
    """Assign texts to rows by best fit decreasing: each to the row that it leaves fullest.

    Args:
        lengths: number of tokens of each text, at most the widest row.
        row_spec: packed or shared rows; a new row has the smallest width that fits its first text.

    Returns:
        For each row the indices of its texts, longest first; equal lengths in order.

    Raises:
        ValueError: a text is longer than the widest row. The tokenizer truncates, this does not.
    """
    sizes = np.asarray(lengths, np.int64)
    widest = row_spec.widths[-1]
    if sizes.max(initial=0) > widest:
        raise ValueError(f"A text has {sizes.max()} tokens; the widest row has {widest}.")
    rows: list[list[int]] = []
    max_texts: list[int] = []
    rows_by_free: list[list[int]] = [[] for _ in range(widest + 1)]
    free_bits = 0  # bit n: some row has n free tokens; finds the best fit without a search
    for text in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[text])
        fitting = free_bits >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = rows_by_free[free].pop()
            if not rows_by_free[free]:
                free_bits ^= 1 << free
        else:
            free, row = row_spec.width_for(size), len(rows)
            rows.append([])
            max_texts.append(row_spec.segments(free))
        rows[row].append(text)
        if len(rows[row]) < max_texts[row]:
            rows_by_free[free - size].append(row)
            free_bits |= 1 << (free - size)
    return [np.array(row, np.intp) for row in rows]


@dataclass(frozen=True, slots=True)
class ChunkSchedule:
    """Sizes of the chunks in which a batch is tokenized, in texts.

    Attributes:
        first: size of the first chunk; small, because the engine waits for it.
        growth: factor by which a chunk may be larger than the one before.
        max_size: largest chunk; larger chunks are planned with less padding.
        last: size to which chunks halve at the end, so that little is left to upload when the
            engine finishes.
    """

    first: int
    growth: int
    max_size: int
    last: int

    def sizes(self, n: int) -> list[int]:
        """Split n texts into chunks."""
        sizes: list[int] = []
        left, size = n, self.first
        while left:
            sizes.append(min(left, size, max(self.last, left // 2)))
            left -= sizes[-1]
            size = min(self.max_size, self.growth * sizes[-1])
        return sizes


#: Chunks for an NPU: no chunk takes longer to tokenize than the device computes the one before.
NPU_CHUNKS: Final = ChunkSchedule(first=32, growth=2, max_size=512, last=64)

#: Chunks for a CPU: a small first one, then all other texts at once, because padding costs a CPU
#: more than waiting for the tokenizer.
CPU_CHUNKS: Final = ChunkSchedule(first=32, growth=128, max_size=4096, last=4096)


class Window(NamedTuple):
    """Plan for the texts that are tokenized so far.

    Attributes:
        rows: for each row to compute now the indices of its texts.
        deferred: indices of texts that are planned again with the next window.
    """

    rows: list[Indices]
    deferred: Indices


def plan_window(
    lengths: npt.ArrayLike, row_spec: RowSpec, n_deferred: int, *, last: bool
) -> Window:
    """Assign the tokenized texts to rows, and defer rows that are not full by one window.

    Best fit needs every length, but the engine needs a first row at once. So a row is computed as
    soon as it is full enough, and a text is deferred once at most.

    Args:
        lengths: number of tokens of each text.
        row_spec: static rows.
        n_deferred: number of texts, the first ones, that were deferred before.
        last: no further text follows.
    """
    rows = plan_rows(lengths, row_spec)
    if last or row_spec.format is not RowFormat.PACKED:
        return Window(rows, np.empty(0, np.intp))
    sizes = np.asarray(lengths, np.int64)
    enough = FULL * row_spec.widths[0]
    ready = [sizes[row].sum() >= enough or row.min() < n_deferred for row in rows]
    deferred = [row for row, is_ready in zip(rows, ready, strict=True) if not is_ready]
    return Window(
        [row for row, is_ready in zip(rows, ready, strict=True) if is_ready],
        np.sort(np.concatenate([np.empty(0, np.intp), *deferred])),
    )


def plan_rows(lengths: npt.ArrayLike, row_spec: RowSpec) -> list[Indices]:
    """Assign texts to static rows; with buckets one text per row, longest first."""
    if row_spec.format is RowFormat.PACKED:
        return plan_packed(lengths, row_spec)
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    return [order[at : at + 1] for at in range(len(order))]


def place_canary(
    rows: list[Indices], lengths: npt.ArrayLike, row_spec: RowSpec, canary: int
) -> list[Indices]:
    """Add the canary to the emptiest row, which becomes the last, or to a new row.

    A static row costs the same however full it is, so the canary is free where it fits.

    Args:
        rows: plan without the canary.
        lengths: number of tokens of each text, canary included.
        row_spec: static rows.
        canary: index of the canary in ``lengths``.
    """
    sizes = np.asarray(lengths, np.int64)
    if rows and row_spec.format is RowFormat.PACKED:
        (width,) = row_spec.widths
        loads = [int(sizes[row].sum()) for row in rows]
        emptiest = loads.index(min(loads))
        row = rows[emptiest]
        if loads[emptiest] + sizes[canary] <= width and len(row) < row_spec.segments(width):
            others = rows[:emptiest] + rows[emptiest + 1 :]
            return [*others, np.append(row, canary)]
    return [*rows, np.array([canary], np.intp)]
