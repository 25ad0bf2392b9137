"""What a check of `embedq-worker check` found, and how it is shown."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Level(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARN = "warn"
    RED = "red"


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Attributes:
        name: what was looked at.
        level: ok; warn, what a production fleet should not have; red, what cannot work.
        detail: what was found.
        seconds: how long the look took.
        mend: the next step, where one is due.
    """

    name: str
    level: Level
    detail: str
    seconds: float
    mend: str = ""

    def as_dict(self) -> dict[str, object]:
        """Return the check for JSON."""
        return asdict(self)


#: What a look finds: a detail, and what is not well about it with its mend.
Finding = tuple[str, Level, str]
