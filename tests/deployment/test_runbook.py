"""docs/operations.md explains each alert and names only things that exist."""

from __future__ import annotations

import re

import pytest
from tests.deployment.test_alerts import ALERTS, known_series
from tests.support.deployment import ROOT

from embedq.settings import ProducerSettings
from embedq_worker.settings import WorkerSettings

TEXT = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
#: Heading -> its text.
SECTIONS = {
    block.partition("\n")[0]: block.partition("\n")[2]
    for block in re.split(r"^###? ", TEXT, flags=re.M)[1:]
}


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_a_section_with_means_check_and_do(name: str) -> None:
    words = re.findall(r"^\*\*(\w+):\*\*", SECTIONS[name], re.M)

    assert words == ["Means", "Check", "Do"]


def test_every_section_of_an_alert_has_its_alert() -> None:
    assert {name for name in SECTIONS if name.startswith("Embedq")} == set(ALERTS)


def test_settings_and_metrics_exist() -> None:
    settings = ProducerSettings.variables() | WorkerSettings.variables()

    assert set(re.findall(r"EMBEDQ_[A-Z_]+[A-Z]", TEXT)) <= settings
    assert set(re.findall(r"\bembedq_worker_\w+", TEXT)) <= known_series() | {
        "embedq_worker_infer_seconds"
    }


def test_links_and_files_exist() -> None:
    anchors = {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in SECTIONS
    }
    files = set(re.findall(r"\bops/[\w./-]*\w", TEXT))

    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors
    assert files
    assert [name for name in sorted(files) if not (ROOT / name).exists()] == []
