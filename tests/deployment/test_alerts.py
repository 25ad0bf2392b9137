"""Recording rules and alerts: valid, tested one by one, and explained in the runbook."""

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
    """Read a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def rules(name: str) -> list[dict[str, Any]]:
    """Return the rules of a file."""
    return [rule for group in load(PROMETHEUS / name)["groups"] for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules("alerts.yml")}


def promtool(*arguments: str | Path) -> str:
    """Run promtool to a good end and return what it says."""
    done = subprocess.run(
        [program("promtool", "prometheus"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def series_of(expression: str) -> set[str]:
    """Return the names of ours that an expression reads."""
    return set(re.findall(r"\bembedq(?:_\w+|:[\w:]+)", expression))


def known_series() -> set[str]:
    """Return the names that the exporter and the recording rules make."""
    names = {rule["record"] for rule in rules("rules.yml")}
    for metric in METRICS:
        if metric.kind is Kind.SUMMARY:
            names |= {f"{metric.name}_sum", f"{metric.name}_count"}
        else:
            names.add(metric.name)
    return names


def test_promtool_accepts_configuration_and_rules() -> None:
    """Prometheus itself parses all of it."""
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_not_before(path: Path) -> None:
    """The cases of ops/deploy/prometheus/tests hold."""
    promtool("test", "rules", path)


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    """No alert is untested, and none is tested by firing alone."""
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


def test_rules_read_only_metrics_that_exist() -> None:
    """A renamed metric would silence an alert for ever."""
    read = {name for name in ("alerts.yml", "rules.yml") for name in _read(name)}

    assert read <= known_series()


def _read(name: str) -> set[str]:
    return set().union(*(series_of(rule["expr"]) for rule in rules(name)))


def test_labels_in_rules_have_values_of_the_code() -> None:
    """Queues and states that a rule names exist."""
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
def test_every_alert_says_what_it_is_and_where_it_is_explained(name: str) -> None:
    """A severity, a summary, a sentence, and a section of the runbook."""
    alert = ALERTS[name]
    notes = alert["annotations"]

    assert alert["labels"]["severity"] in ("page", "ticket")
    assert notes["summary"]
    assert notes["description"].endswith((".", "}}"))
    assert notes["runbook_url"] == f"docs/operations.md#{name.lower()}"


def test_a_degraded_worker_is_told_without_delay() -> None:
    """Fifteen seconds from the device to the operator leave no room for a `for`."""
    config = load(PROMETHEUS / "prometheus.yml")["global"]

    assert "for" not in ALERTS["EmbedqWorkerDegraded"]
    assert (config["scrape_interval"], config["evaluation_interval"]) == ("5s", "5s")


def test_labels_of_the_exporter_win() -> None:
    """The exporter's labels `job` and `instance` mean embedq's own, not the target's."""
    [scrape] = load(PROMETHEUS / "prometheus.yml")["scrape_configs"]

    assert scrape["honor_labels"] is True
