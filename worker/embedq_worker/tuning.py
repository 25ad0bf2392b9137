"""How an engine uses the cores of this machine, and when another way is better. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

#: Padded tokens of one inference that are tried.
BUDGETS: Final = (256, 512, 1024, 2048)
#: Least gain for which the usual layout is left.
MIN_GAIN: Final = 0.03


class Layout(NamedTuple):
    """How an engine uses the cores.

    Attributes:
        cores: that it computes on.
        streams: inferences at a time; they share the cores.
        token_budget: most padded tokens of one inference.
        source: ``usual``, ``tuned`` or ``settings``.
    """

    cores: int
    streams: int
    token_budget: int
    source: str = "usual"

    def describe(self) -> str:
        """Say it in a few words."""
        return (
            f"{self.streams} streams on {self.cores} cores, {self.token_budget} tokens "
            f"({self.source})"
        )

    @classmethod
    def from_entry(cls, entry: Mapping[str, object], most: int) -> Layout | None:
        """Read what was kept; None for what is no layout for this many cores."""
        found = [entry.get(name) for name in ("cores", "streams", "token_budget")]
        numbers = [value for value in found if type(value) is int and value > 0]
        if len(numbers) != len(found) or numbers[0] > most or numbers[1] > numbers[0]:
            return None
        return cls(numbers[0], numbers[1], numbers[2], "tuned")

    def overridden(self, cores: int, streams: int, token_budget: int) -> Layout:
        """Return this layout with what the settings say; 0 says nothing."""
        if not (cores or streams or token_budget):
            return self
        wanted = cores or self.cores
        return Layout(
            wanted,
            min(streams or (wanted if cores else self.streams), wanted),
            token_budget or self.token_budget,
            "settings",
        )

    def entry(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {"cores": self.cores, "streams": self.streams, "token_budget": self.token_budget}


class Timing(NamedTuple):
    """What was measured of a layout.

    Attributes:
        layout: which.
        seconds: of each round.
        gain: median over the rounds of the usual layout's seconds by this one's, less 1.
        noise: half of what lies between the quartiles of that.
    """

    layout: Layout
    seconds: tuple[float, ...]
    gain: float
    noise: float


def layouts(cores: int, usual_budget: int) -> list[Layout]:
    """List what is worth trying on this many cores, the usual one first."""
    usual = Layout(cores, cores, usual_budget)
    streams = sorted({cores, max(1, cores // 2), 1}, reverse=True)
    tried = [Layout(cores, count, budget) for count in streams for budget in BUDGETS]
    return [usual, *(each for each in tried if each != usual)]


def timings(rounds: Mapping[Layout, Sequence[float]], usual: Layout) -> list[Timing]:
    """Compare each layout with the usual one, round by round: a drift of the machine meets both."""
    found = []
    for layout, seconds in rounds.items():
        gains = [u / s - 1 for u, s in zip(rounds[usual], seconds, strict=True)]
        low, _, high = statistics.quantiles(gains, n=4) if len(gains) > 1 else (0.0, 0.0, 0.0)
        found.append(
            Timing(layout, tuple(seconds), statistics.median(gains), max(0.0, high - low) / 2)
        )
    return found


def decide(found: Sequence[Timing], usual: Layout) -> Layout:
    """Choose the layout with the largest gain that noise does not explain, else the usual one."""
    better = [each for each in found if each.gain > max(MIN_GAIN, each.noise)]
    return max(better, key=lambda each: each.gain).layout if better else usual
