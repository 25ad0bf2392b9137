"""Records that others wrote into Redis: types checked, words fit for a terminal. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

#: Most characters of a field that is shown.
LONGEST: Final = 2_000
#: Largest number, in size: times in seconds stay within what calendars know.
LARGEST: Final = 1e12
_CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_TYPES: Final[Mapping[object, tuple[type, ...]]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
}


def plain(text: str) -> str:
    """Return a text without what moves a cursor or ends a line, and not too long."""
    return _CONTROLS.sub(" ", text[:LONGEST])


def checked(kind: Any, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return those fields of a body that a dataclass knows, each of the type that it says.

    Texts come back plain, but for those that the class keeps out of its repr: they are content.

    Raises:
        TypeError: a field is of another type, or no number to work with.
    """
    found = {}
    for field in fields(kind):
        if field.name not in body:
            continue
        value = body[field.name]
        if not isinstance(value, _TYPES.get(field.type, (object,))):
            raise TypeError(f"{field.name} is {type(value).__name__}, expected {field.type}.")
        if isinstance(value, int | float) and not abs(value) <= LARGEST:
            raise TypeError(f"{field.name} is out of bounds.")
        found[field.name] = plain(value) if isinstance(value, str) and field.repr else value
    return found
