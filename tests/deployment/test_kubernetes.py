"""Kubernetes manifests are valid, hardened, and consistent with the code."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from tests.deployment.test_alerts import known_series, series_of
from tests.support.deployment import DEPLOY

from embedq.protocol.contract import Queue
from embedq_worker.settings import WorkerSettings

KUSTOMIZATION = yaml.safe_load((DEPLOY / "kustomization.yaml").read_text())
OBJECTS: list[dict[str, Any]] = [
    item
    for name in KUSTOMIZATION["resources"]
    for item in yaml.safe_load_all((DEPLOY / name).read_text())
]
WORKLOADS = {
    item["metadata"]["name"]: item
    for item in OBJECTS
    if item["kind"] in ("Deployment", "StatefulSet")
}
#: Kinds that are not of Kubernetes itself and have no schema here.
CUSTOM_KINDS = ("ScaledObject",)
#: Kubernetes release of the schemas.
RELEASE = "1.31"


@pytest.mark.parametrize(
    "manifest",
    [item for item in OBJECTS if item["kind"] not in CUSTOM_KINDS],
    ids=lambda item: f"{item['kind']}-{item['metadata']['name']}",
)
def test_manifest_matches_the_schema_of_the_api(manifest: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

    validator.validate(manifest, RELEASE, strict=True)


def test_kustomization_lists_every_manifest_and_existing_files() -> None:
    manifests = {f"k8s/{path.name}" for path in (DEPLOY / "k8s").glob("*.yaml")}
    sources = {
        file.partition("=")[2] or file
        for generator in KUSTOMIZATION["configMapGenerator"]
        for file in generator["files"]
    }

    assert set(KUSTOMIZATION["resources"]) == manifests
    assert all((DEPLOY / source).is_file() for source in sources)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_pod_is_hardened_limited_and_probed(name: str) -> None:
    """As the Pod Security level `restricted` of the namespace requires."""
    pod = WORKLOADS[name]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    security = container["securityContext"]

    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in container["resources"]["limits"]
    assert "livenessProbe" in container
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))


def test_every_image_has_a_full_version() -> None:
    """In the manifest or in the kustomization."""
    tags = {image["name"]: image["newTag"] for image in KUSTOMIZATION["images"]}
    for workload in WORKLOADS.values():
        image = workload["spec"]["template"]["spec"]["containers"][0]["image"]
        tag = tags.get(image) or image.partition(":")[2]

        assert re.match(r"v?\d+\.\d+\.\d+", tag), image


@pytest.mark.parametrize("name", ["worker-cpu", "worker-npu"])
def test_workers_are_probed_by_health_and_may_finish_their_batch(name: str) -> None:
    pod = WORKLOADS[name]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    named = {item["name"] for item in container["env"]}

    command = container["livenessProbe"]["exec"]["command"]

    assert command == ["embedq-worker", "health", "--max-age-s", "30"]
    assert named <= WorkerSettings.variables()
    assert pod["terminationGracePeriodSeconds"] == 90


def test_npu_worker_requests_one_npu() -> None:
    resources = WORKLOADS["worker-npu"]["spec"]["template"]["spec"]["containers"][0]["resources"]

    assert resources["limits"]["npu.intel.com/accel"] == "1"
    assert resources["requests"]["npu.intel.com/accel"] == "1"


def test_scaling_queries_existing_series_and_queues() -> None:
    [scaled] = [item for item in OBJECTS if item["kind"] == "ScaledObject"]
    queries = [trigger["metadata"]["query"] for trigger in scaled["spec"]["triggers"]]

    read = set().union(*(series_of(query) for query in queries))
    queues = {
        queue
        for query in queries
        for found in re.findall(r'queue=~"([^"]+)"', query)
        for queue in str(found).split("|")
    }

    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    assert scaled["spec"]["scaleTargetRef"]["name"] in WORKLOADS
    assert read == {"embedq_queue_ready_messages", "embedq_queue_oldest_ready_age_seconds"}
    assert read <= known_series()
    assert queues <= {str(queue) for queue in Queue}
    for trigger in scaled["spec"]["triggers"]:
        assert trigger["type"] == "prometheus"
        assert {"serverAddress", "query", "threshold"} == set(trigger["metadata"])


def test_selectors_match_pods() -> None:
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in WORKLOADS.values()]
    for item in OBJECTS:
        if item["kind"] == "Service":
            wanted = item["spec"]["selector"]
        elif item["kind"] == "PodDisruptionBudget":
            wanted = item["spec"]["selector"]["matchLabels"]
        else:
            continue
        assert any(wanted.items() <= pod.items() for pod in labels), item["metadata"]["name"]
