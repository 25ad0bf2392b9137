"""README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embedq.settings import OTHER_ROOMS, PREFIX, ProducerSettings, Room
from embedq_worker.settings import SOURCE_ONLY, WorkerSettings

README = Path(__file__).parents[2] / "README.md"
ROOMS: dict[str, type[Room]] = {
    "embedq.settings.ProducerSettings": ProducerSettings,
    "embedq_worker.settings.WorkerSettings": WorkerSettings,
}


def table(room: type[Room]) -> str:
    """Return the table of a settings class as README must have it."""
    lines = ["| variable | default | unit | meaning |", "|---|---|---|---|"]
    for name, info in room.model_fields.items():
        extra = info.json_schema_extra
        unit = extra.get("unit", "") if isinstance(extra, dict) else ""
        # A computed default depends on the machine; its meaning says how.
        default = "by machine" if info.default_factory else info.default
        shown = "" if default in (None, "") else f"`{default}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {shown} | {unit} | {info.description} |")
    return "\n".join(lines)


@pytest.mark.parametrize("name", ROOMS)
def test_settings_table_is_the_class(name: str) -> None:
    """Each settings class stands in README, field by field, with default, unit and meaning."""
    marker = f"<!-- settings: {name} -->\n"

    _, _, rest = README.read_text(encoding="utf-8").partition(marker)
    found = re.match(r"(?:\|.*\n)+", rest)

    assert found is not None and found.group(0).strip() == table(ROOMS[name])


def test_each_room_knows_the_other_rooms_variables() -> None:
    """The SDK tells a worker's variable from a typo without importing the worker."""
    foreign = WorkerSettings.variables() - ProducerSettings.variables()

    assert foreign | SOURCE_ONLY == OTHER_ROOMS


if __name__ == "__main__":  # python tests/unit/test_readme.py: write the tables anew
    text = README.read_text(encoding="utf-8")
    for name, room in ROOMS.items():
        marker = f"<!-- settings: {name} -->\n"
        head, _, rest = text.partition(marker)
        text = head + marker + table(room) + "\n" + re.sub(r"\A(?:\|.*\n)*", "", rest)
    README.write_text(text, encoding="utf-8")
