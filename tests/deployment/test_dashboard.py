"""The dashboard is what Grafana can provision, and shows only what exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from tests.deployment.test_alerts import known_series, promtool, series_of
from tests.support.deployment import DEPLOY, ROOT

GRAFANA = DEPLOY / "grafana"
DASHBOARD: dict[str, Any] = json.loads((GRAFANA / "dashboards" / "embedq.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_questions_are_answered_in_order() -> None:
    """Five rows, from whether it is well to how far the jobs are."""
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]

    assert rows == [
        "Is it well?",
        "How fast?",
        "What waits?",
        "Who is degraded, and why?",
        "How far are the jobs?",
    ]


def test_panels_ask_the_provisioned_prometheus_for_series_that_exist() -> None:
    """Every query names a metric or a recording rule of ours, or the alerts."""
    [source] = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]

    queries = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]

    for title, target in queries:
        read = series_of(target["expr"])
        assert read or "ALERTS{" in target["expr"], title
        assert read <= known_series(), title
        assert target["datasource"]["uid"] == source["uid"]


def test_prometheus_parses_every_query(tmp_path: Path) -> None:
    """Each query is an expression, as promtool sees it in a rule."""
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(queries)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", path)


def test_every_panel_says_what_it_shows_and_has_a_place() -> None:
    """Titles, descriptions and ids are there; no two panels overlap."""
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own

    assert all(panel["title"] and panel["description"] for panel in PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_provider_points_at_the_folder_that_compose_mounts() -> None:
    """The dashboard is found where the container has it."""
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/embedq.yml").read_text())[
        "providers"
    ]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]

    targets = [volume.split(":")[1] for volume in grafana["volumes"]]

    assert provider["options"]["path"] in targets
