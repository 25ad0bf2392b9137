"""README says what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from embedq.observability import metrics
from embedq.settings import PREFIX, EnvSettings, ProducerSettings
from embedq_worker.settings import WorkerSettings

README = Path(__file__).parents[2] / "README.md"
ROOMS: dict[str, type[EnvSettings]] = {
    "embedq.settings.ProducerSettings": ProducerSettings,
    "embedq_worker.settings.WorkerSettings": WorkerSettings,
}
METRICS_MARKER = "<!-- metrics: embedq.observability.metrics -->\n"


def table(room: type[EnvSettings]) -> str:
    """Return the table of a settings class as README must have it."""
    lines = ["| variable | default | unit | meaning |", "|---|---|---|---|"]
    for name, info in room.public_fields().items():
        extra = info.json_schema_extra
        unit = extra.get("unit", "") if isinstance(extra, dict) else ""
        # A computed default depends on the machine; its meaning says how.
        default = "by machine" if info.default_factory else info.default
        shown = "" if default in (None, "") else f"`{default}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {shown} | {unit} | {info.description} |")
    return "\n".join(lines)


def shown(marker: str) -> str:
    """Return the table that README has after a marker."""
    _, _, rest = README.read_text(encoding="utf-8").partition(marker)
    found = re.match(r"(?:\|.*\n)+", rest)
    return found.group(0).strip() if found else ""


@pytest.mark.parametrize("name", ROOMS)
def test_settings_table_is_the_class(name: str) -> None:
    """Each settings class stands in README, field by field, with default, unit and meaning."""
    assert shown(f"<!-- settings: {name} -->\n") == table(ROOMS[name])


def test_metrics_table_is_the_code() -> None:
    """Each metric stands in README with kind, labels and meaning."""
    assert shown(METRICS_MARKER) == metrics.table()


if __name__ == "__main__":  # python tests/unit/test_readme.py: write the tables anew
    text = README.read_text(encoding="utf-8")
    tables = {f"<!-- settings: {name} -->\n": table(room) for name, room in ROOMS.items()}
    for marker, wanted in {**tables, METRICS_MARKER: metrics.table()}.items():
        head, _, rest = text.partition(marker)
        text = head + marker + wanted + "\n" + re.sub(r"\A(?:\|.*\n)*", "", rest)
    README.write_text(text, encoding="utf-8")
