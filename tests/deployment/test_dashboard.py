"""The Grafana dashboard can be provisioned and queries existing series."""

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


def test_rows_are_in_order() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]

    assert rows == [
        "Health",
        "Throughput",
        "Queues",
        "Degraded workers",
        "Jobs",
    ]


def test_panels_query_existing_series_of_the_provisioned_prometheus() -> None:
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
    queries = [target["expr"] for panel in PANELS for target in panel["targets"]]
    rules = [{"record": f"panel:{n}", "expr": query} for n, query in enumerate(queries)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))

    promtool("check", "rules", path)


def test_panels_have_titles_descriptions_and_do_not_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        position = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(position["x"], position["x"] + position["w"])
            for y in range(position["y"], position["y"] + position["h"])
        }
        assert not covered & cells, panel["title"]
        assert position["x"] + position["w"] <= 24
        cells |= covered

    assert all(panel["title"] and panel["description"] for panel in PANELS)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_provider_reads_the_folder_that_compose_mounts() -> None:
    [provider] = yaml.safe_load((GRAFANA / "provisioning/dashboards/embedq.yml").read_text())[
        "providers"
    ]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]

    targets = [volume.split(":")[1] for volume in grafana["volumes"]]

    assert provider["options"]["path"] in targets
