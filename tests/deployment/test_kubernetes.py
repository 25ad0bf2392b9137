"""Kubernetes manifests: valid by the API's schemas, hardened, and true to the code."""

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
    each
    for name in KUSTOMIZATION["resources"]
    for each in yaml.safe_load_all((DEPLOY / name).read_text())
]
WORKLOADS = {
    each["metadata"]["name"]: each
    for each in OBJECTS
    if each["kind"] in ("Deployment", "StatefulSet")
}
#: Kinds whose schema is not Kubernetes' own; their fields are tested below.
FOREIGN = ("ScaledObject",)
#: Release whose API the manifests are for.
RELEASE = "1.31"


@pytest.mark.parametrize(
    "manifest",
    [each for each in OBJECTS if each["kind"] not in FOREIGN],
    ids=lambda each: f"{each['kind']}-{each['metadata']['name']}",
)
def test_manifest_is_valid_by_the_schema_of_the_api(manifest: dict[str, Any]) -> None:
    """Every field exists and has the right type."""
    validator = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")

    validator.validate(manifest, RELEASE, strict=True)


def test_kustomization_names_every_manifest_and_files_that_exist() -> None:
    """Nothing lies about unused, and generated maps have their sources."""
    there = {f"k8s/{path.name}" for path in (DEPLOY / "k8s").glob("*.yaml")}
    sources = {
        file.partition("=")[2] or file
        for generator in KUSTOMIZATION["configMapGenerator"]
        for file in generator["files"]
    }

    assert set(KUSTOMIZATION["resources"]) == there
    assert all((DEPLOY / source).is_file() for source in sources)


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_pod_is_locked_in_bounded_and_probed(name: str) -> None:
    """What the namespace enforces (Pod Security, restricted), and limits and probes beside it."""
    pod = WORKLOADS[name]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    own = container["securityContext"]

    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert "memory" in container["resources"]["limits"]
    assert "livenessProbe" in container
    assert not any("hostPath" in volume for volume in pod.get("volumes", []))


def test_every_image_is_pinned() -> None:
    """By its tag here, or by the tag that the kustomization gives it."""
    ours = {image["name"]: image["newTag"] for image in KUSTOMIZATION["images"]}
    for workload in WORKLOADS.values():
        image = workload["spec"]["template"]["spec"]["containers"][0]["image"]
        tag = ours.get(image) or image.partition(":")[2]

        assert re.match(r"v?\d+\.\d+\.\d+", tag), image


@pytest.mark.parametrize("name", ["worker-cpu", "worker-npu"])
def test_workers_are_asked_by_the_command_that_exists_and_may_finish(name: str) -> None:
    """Probes run embedq-worker health; settings exist; SIGTERM has the grace of a batch."""
    pod = WORKLOADS[name]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    named = {each["name"] for each in container["env"]}

    command = container["livenessProbe"]["exec"]["command"]

    assert command == ["embedq-worker", "health", "--max-age-s", "30"]
    assert named <= WorkerSettings.variables()
    assert pod["terminationGracePeriodSeconds"] == 90


def test_a_worker_on_an_npu_asks_for_exactly_one() -> None:
    """The resource of Intel's device plugin, requested and limited alike."""
    resources = WORKLOADS["worker-npu"]["spec"]["template"]["spec"]["containers"][0]["resources"]

    assert resources["limits"]["npu.intel.com/accel"] == "1"
    assert resources["requests"]["npu.intel.com/accel"] == "1"


def test_scaling_asks_for_series_and_queues_that_exist() -> None:
    """Queue length and oldest age, by the fields that KEDA's Prometheus scaler requires."""
    [scaled] = [each for each in OBJECTS if each["kind"] == "ScaledObject"]
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


def test_selectors_find_pods() -> None:
    """Services, budgets and policies select labels that some pod carries."""
    labels = [each["spec"]["template"]["metadata"]["labels"] for each in WORKLOADS.values()]
    for each in OBJECTS:
        if each["kind"] == "Service":
            wanted = each["spec"]["selector"]
        elif each["kind"] == "PodDisruptionBudget":
            wanted = each["spec"]["selector"]["matchLabels"]
        else:
            continue
        assert any(wanted.items() <= own.items() for own in labels), each["metadata"]["name"]
