"""docker-compose.yml is valid, hardened, and consistent with the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.deployment import OPS, ROOT, make_secrets

from embedq.settings import ProducerSettings
from embedq_worker.settings import WorkerSettings

PATH = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(PATH.read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STAGES = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "worker/Dockerfile").read_text(), re.M))


def test_file_matches_the_compose_specification() -> None:
    words = ("check_jsonschema", "--builtin-schema", "vendor.compose-spec", PATH)

    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


def test_default_profile_has_every_service_but_npu_workers() -> None:
    default = {name for name, service in SERVICES.items() if "profiles" not in service}

    assert default == {
        "redis-broker",
        "redis-results",
        "worker-cpu",
        "exporter",
        "flower",
        "prometheus",
        "grafana",
    }
    assert SERVICES["worker-npu0"]["profiles"] == ["npu"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_restarted_checked_limited_and_hardened(name: str) -> None:
    service = SERVICES[name]
    limits = service["deploy"]["resources"]["limits"]

    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert {"interval", "timeout", "retries", "start_period"} <= set(service["healthcheck"])
    assert re.fullmatch(r"\d+s", service["stop_grace_period"])
    assert {"cpus", "memory", "pids"} <= set(limits)
    assert int(service["user"].split(":")[0]) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service


@pytest.mark.parametrize("name", SERVICES)
def test_every_image_has_a_full_version(name: str) -> None:
    """An image that is built here names an existing stage of the Dockerfile."""
    service = SERVICES[name]

    assert re.search(r":v?\d+\.\d+\.\d+(-[a-z]+)?$", service["image"])
    if "build" in service:
        assert service["build"]["target"] in STAGES
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_every_setting_exists() -> None:
    """A worker does not start with a misspelled setting."""
    known = ProducerSettings.variables() | WorkerSettings.variables()
    named = {
        variable
        for service in SERVICES.values()
        for variable in service.get("environment", {})
        if variable.startswith("EMBEDQ_")
    }
    files = {
        secret["target"].upper()
        for service in SERVICES.values()
        for secret in service.get("secrets", [])
        if isinstance(secret, dict)
    }

    assert named
    assert named | files <= known


def test_every_mounted_file_exists() -> None:
    sources = [
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if volume.startswith("./")
    ]

    assert sources
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_secrets_are_ignored_files_made_by_ops_secrets() -> None:
    script = (OPS / "secrets").read_text()
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    made = set(re.findall(r"\b(\w+_(?:password|auth))\b", script))
    made |= {f"{user}_{kind}_url" for user in ("worker", "ops") for kind in ("broker", "results")}
    made |= {"broker_acl", "results_acl", "ops_password"}

    assert "/secrets/" in ignored
    assert set(COMPOSE["secrets"]) <= made
    assert all(secret["file"] == f"./secrets/{name}" for name, secret in COMPOSE["secrets"].items())
    assert not re.search(r"redis://[^{\s]*:[^{\s]*@", PATH.read_text())


def test_ports_are_bound_to_loopback_by_default() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]

    assert all(port.startswith(("127.0.0.1:", "${BIND_ADDRESS:-127.0.0.1}:")) for port in ports)


@pytest.mark.parametrize("name", [name for name in SERVICES if name.startswith("worker-npu")])
def test_npu_worker_has_one_device_its_group_and_the_lock_folder(name: str) -> None:
    service = SERVICES[name]

    assert len(service["devices"]) == 1
    assert re.search(r"/dev/accel/accel\d", service["devices"][0])
    assert service["group_add"] == ["${RENDER_GID:-0}"]
    locks = service["environment"]["EMBEDQ_LOCK_DIR"]
    assert f"{locks}:{locks}" in service["volumes"]


def test_memory_limit_of_redis_is_twice_maxmemory() -> None:
    """A rewrite of the append-only file needs up to twice maxmemory."""
    for name in ("redis-broker", "redis-results"):
        service = SERVICES[name]
        default = re.findall(r":-(\d+)(mb|gb)", service["command"][-1])[0]
        limit = re.findall(r"(\d+)g", service["deploy"]["resources"]["limits"]["memory"])[0]

        megabytes = int(default[0]) * (1024 if default[1] == "gb" else 1)

        assert int(limit) * 1024 >= 2 * megabytes


def test_new_password_does_not_change_the_addresses(tmp_path: Path) -> None:
    addresses = {"REDIS_BROKER": "10.0.0.1:7000/2", "REDIS_RESULTS": "10.0.0.2:7001/3"}
    made = make_secrets(tmp_path, **addresses)
    before = (made / "ops_broker_url").read_text()
    (made / "ops_password").unlink()

    make_secrets(tmp_path)

    after = (made / "ops_broker_url").read_text()
    assert before != after
    assert after.strip().endswith("@10.0.0.1:7000/2")
    assert (made / "worker_results_url").read_text().strip().endswith("@10.0.0.2:7001/3")
