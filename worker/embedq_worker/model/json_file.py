"""Read the JSON files of a model folder with one clear error for everything that may be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from embedq_worker.errors import ModelError

#: Maximum size of a JSON file, bytes. The largest tokenizer.json of a known model has 34 MB.
MAX_JSON_BYTES: Final = 200_000_000


def load_json(path: Path, kind: type[Any]) -> Any:
    """Load a JSON file that contains a dict or a list; None if the file is missing.

    Raises:
        ModelError: the file is not JSON, or contains another type.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        value = json.loads(path.read_bytes())
        # Escapes like \ud800 alone are valid JSON, but no text, path or token.
        json.dumps(value, ensure_ascii=False).encode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, kind):
        raise ModelError(
            f"{path} contains a {type(value).__name__}, expected a {kind.__name__}. "
            "Fetch the file again."
        )
    return value


def is_file(path: Path) -> bool:
    """Return whether there is a file; False for a name too long for one, which a file may give."""
    try:
        return path.is_file()
    except OSError:
        return False


class JsonFile:
    """The values of a JSON object; a wrong one is a ModelError that names file, key and value."""

    def __init__(self, path: Path, values: Mapping[str, Any], *, supported_by: str = "") -> None:
        """Wrap values that were read from a file.

        Args:
            path: the file, for messages.
            values: its object.
            supported_by: what else supports a value that is refused; ends the message.
        """
        self.path = path
        self.values = values
        self._supported_by = supported_by or "Use another model."

    @classmethod
    def load(cls, path: Path, *, supported_by: str = "") -> JsonFile:
        """Load a file; a missing file has no values.

        Raises:
            ModelError: as load_json.
        """
        return cls(path, load_json(path, dict) or {}, supported_by=supported_by)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value; the default where it is missing or null."""
        value = self.values.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return an integer of at least `minimum`; without a default it must be there."""
        value = self.get(name, default)
        if type(value) is not int or not minimum <= value < 2**31:
            raise ModelError(
                f"{self.path}: {name} is {value!r}, expected an integer of at least {minimum}. "
                "Fetch the file again."
            )
        return value

    def number(self, name: str, default: float) -> float:
        """Return a finite number."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise ModelError(
                f"{self.path}: {name} is {value!r}, expected a number. Fetch the file again."
            )
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return true or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise ModelError(
                f"{self.path}: {name} is {value!r}, expected true or false. Fetch the file again."
            )
        return value

    def text(self, name: str, default: str = "") -> str:
        """Return a text."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise ModelError(
                f"{self.path}: {name} is {value!r}, expected a text. Fetch the file again."
            )
        return value

    def one_of(self, name: str, *supported: Any, default: Any = None) -> Any:
        """Return one of the supported values; the default, or else the first, if it is missing."""
        value = self.get(name, supported[0] if default is None else default)
        if not any(type(value) is type(one) and value == one for one in supported):
            raise self.unsupported(name, value, *supported)
        return value

    def unsupported(self, name: str, value: object, *supported: object) -> ModelError:
        """Return the error for a value that has a meaning which embedq does not know."""
        shown = str(value) if len(str(value)) <= 200 else f"{str(value)[:200]}..."
        known = " or ".join(map(str, supported))
        return ModelError(
            f"{self.path}: {name} is {shown}; embedq supports {known}. {self._supported_by}"
        )
