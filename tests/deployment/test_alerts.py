"""Recording rules and alerts are valid, tested, and explained in the runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.binaries import program
from tests.support.deployment import DEPLOY

from embedq.observability.metrics import METRICS, STATES, Kind
from embedq.protocol.contract import Queue

PROMETHEUS = DEPLOY / "prometheus"
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in load(PROMETHEUS / name)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}


def promtool(*arguments: str | Path) -> str:
    """Run promtool, require success, and return its output."""
    done = subprocess.run(
        [program("promtool", "prometheus"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def series_of(expression: str) -> set[str]:
    """Return the series of embedq that an expression reads."""
    return set(re.findall(r"\bembedq(?:_\w+|:[\w:]+)", expression))


def known_series() -> set[str]:
    """Return the series that the exporter and the recording rules create."""
    names = {rule["record"] for rule in rules("rules.yml")}
    for metric in METRICS:
        if metric.kind is Kind.SUMMARY:
            names |= {f"{metric.name}_sum", f"{metric.name}_count"}
        else:
            names.add(metric.name)
    return names


def test_promtool_accepts_configuration_and_rules() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_as_expected(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_alert_has_a_firing_and_a_silent_case() -> None:
    cases = [
        case
        for path in TESTS
        for test in load(path)["tests"]
        for case in test.get("alert_rule_test", [])
    ]

    fires = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}

    assert fires == set(ALERTS)
    assert silent >= set(ALERTS)


def test_rules_read_existing_metrics() -> None:
    read = {name for name in ("alerts.yml", "rules.yml") for name in _read(name)}

    assert read <= known_series()


def _read(name: str) -> set[str]:
    return set().union(*(series_of(rule["expr"]) for rule in rules(name)))


def test_queues_and_states_in_rules_exist() -> None:
    text = (PROMETHEUS / "alerts.yml").read_text() + (PROMETHEUS / "rules.yml").read_text()
    queues = set(re.findall(r'queue(?:="|: )(embed[\w.]+)', text))
    states = {
        word
        for found in re.findall(r'[{ ]state=~?"([^"]+)"', text)
        for word in str(found).split("|")
    }

    assert queues <= {str(queue) for queue in Queue}
    assert states <= set(STATES)


@pytest.mark.parametrize("name", ALERTS)
def test_every_alert_has_severity_texts_and_a_runbook_link(name: str) -> None:
    alert = ALERTS[name]
    annotations = alert["annotations"]

    assert alert["labels"]["severity"] in ("page", "ticket")
    assert annotations["summary"]
    assert annotations["description"].endswith((".", "}}"))
    assert annotations["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_degraded_worker_fires_without_delay() -> None:
    """It must fire within 15 s, see tests/e2e."""
    config = load(PROMETHEUS / "prometheus.yml")["global"]

    assert "for" not in ALERTS["EmbedqWorkerDegraded"]
    assert (config["scrape_interval"], config["evaluation_interval"]) == ("5s", "5s")


def test_labels_of_the_exporter_are_honored() -> None:
    """Its labels `job` and `instance` name a job of embedq and a Redis."""
    [scrape] = load(PROMETHEUS / "prometheus.yml")["scrape_configs"]

    assert scrape["honor_labels"] is True
