"""Every feature of the NPU embedder that embedq descends from has its place and a test.

The rows are the features of an NPU path for an embedding daemon, one by one, and the findings of
its review.
"""

from __future__ import annotations

import ast
import importlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[2]
UNIT = "unit/worker"


class Row(NamedTuple):
    """One feature.

    Attributes:
        feature: what that embedder does, or what its review found.
        place: where it lives here, as `module:name`.
        test: where it is proven, as `file::name` below tests/.
    """

    feature: str
    place: str
    test: str


ROWS = (
    Row(
        "opt-in: without the extra nothing changes for users of a CPU",
        "embedq_worker.device.placement:find_npu",
        f"{UNIT}/test_placement.py::test_missing_openvino_is_said_with_the_extra",
    ),
    Row(
        "auto, cpu or npu by setting and environment",
        "embedq_worker.settings:DeviceChoice",
        f"{UNIT}/test_placement.py::test_auto_takes_the_npu_that_is_there",
    ),
    Row(
        "strict at the start",
        "embedq_worker.device.placement:place",
        f"{UNIT}/test_placement.py::test_strict_node_never_computes_on_its_cpu",
    ),
    Row(
        "strict in the middle of a run, which that one lacks",
        "embedq_worker.main_process.device_health:queues_for",
        f"{UNIT}/test_health.py::test_no_cpu_ever_gets_a_strict_batch",
    ),
    Row(
        "strict for one job",
        "embedq.discovery:StrictWatch",
        "integration/test_start.py::test_strict_job_is_served_by_an_npu_alone",
    ),
    Row(
        "eager preload: nothing is taken before the engine is proven",
        "embedq_worker.pool_process.process:on_process_init",
        f"{UNIT}/test_health.py::test_node_without_a_state_consumes_nothing",
    ),
    Row(
        "is-active for each vector, not only as configured",
        "embedq.protocol.contract:Outcome",
        f"{UNIT}/test_embedder.py::test_outcome_names_device_and_precision",
    ),
    Row(
        "is-active is read live: a degraded node says so",
        "embedq_worker.main_process.status:NodeState",
        "integration/test_start.py::test_npu_that_cannot_be_proven",
    ),
    Row(
        "warm request pool and its sizing, 4 at a loss and 1 to 8",
        "embedq_worker.engines.infer_requests:request_count",
        f"{UNIT}/test_requests.py::test_requests_are_as_many_as_the_device_likes",
    ),
    Row(
        "static reshape, now rows of one compiled shape",
        "embedq_worker.engines.compiler:shapes_of",
        f"{UNIT}/test_loader.py::test_model_is_compiled_once",
    ),
    Row(
        "blob cache",
        "embedq_worker.engines.model_cache:BlobStore",
        f"{UNIT}/test_blobs.py::test_stored_blob_comes_back",
    ),
    Row(
        "precision knob, f16 on an NPU",
        "embedq_worker.settings:PrecisionChoice",
        f"{UNIT}/test_choices.py::test_contradiction_is_refused_with_both_names",
    ),
    Row(
        "properties that the plugin does not know are left out",
        "embedq_worker.engines.openvino_npu:npu_properties",
        f"{UNIT}/test_properties.py::test_unknown_property_is_ignored_visibly",
    ),
    Row(
        "graceful fallback when the NPU fails at the start",
        "embedq_worker.main_process.start:start",
        f"{UNIT}/test_placement.py::test_npu_that_failed_leaves_a_degraded_node",
    ),
    Row(
        "degraded with a reason, and not for ever",
        "embedq_worker.main_process.device_health:Health",
        "integration/test_degrade.py::test_faulty_npu_hands_its_batch_on_and_comes_back",
    ),
    Row(
        "the texts of the failing call go to the CPU, which that one answers with an error",
        "embedq_worker.main_process.rerouting:hand_over",
        "integration/test_degrade.py::test_faulty_npu_hands_its_batch_on_and_comes_back",
    ),
    Row(
        "model lengths: each model's own, the same on both devices",
        "embedq_worker.model.config:read_traits",
        f"{UNIT}/test_models.py",
    ),
    Row(
        "library search: `check` shows plugin, loader and driver instead",
        "embedq_worker.cli.check_npu:lines",
        f"{UNIT}/test_checks_device.py::test_whole_chain_is_shown",
    ),
    Row(
        "log lines that say what really loaded",
        "embedq_worker.inference.opener:open_placed",
        f"{UNIT}/test_placed_serving.py::test_engine_on_another_device_is_refused",
    ),
    Row(
        "lock: one process per device, and the second names the first",
        "embedq_worker.device.placement:claim",
        f"{UNIT}/test_claims.py::test_second_process_is_refused_with_the_holders_pid",
    ),
    Row(
        "private files: umask 077 there, folders of 0700 here",
        "embedq_worker.files:private_dir",
        f"{UNIT}/test_choices.py::test_runtime_folder_of_another_user_is_refused",
    ),
    Row(
        "bounded requests: a cap of bytes before anything is inflated",
        "embedq.protocol.message:Header",
        "unit/producer/test_contract.py",
    ),
    Row(
        "logs are not thrown away: a crash is a line of the supervisor",
        "embedq_worker.main_process.supervisor:supervise",
        f"{UNIT}/test_supervisor.py::test_stop_during_a_pause_starts_nothing",
    ),
    Row(
        "no NaN reaches a caller",
        "embedq_worker.inference.selftest:run",
        f"{UNIT}/test_embedder.py::test_vector_that_is_not_finite_is_a_fault_of_the_engine",
    ),
    Row(
        "smoke and fallback tests in processes of their own",
        "embedq_worker.engines.compiler:main",
        "integration/test_start.py::test_npu_that_cannot_be_proven",
    ),
    Row(
        "review: concurrent callers wait for a request, none fails",
        "embedq_worker.engines.infer_requests:Pool",
        "conformance/test_engines.py::test_many_threads_may_infer",
    ),
    Row(
        "review: a request has one owner at a time",
        "embedq_worker.engines.infer_requests:Slot",
        f"{UNIT}/test_requests.py::test_more_callers_than_requests_wait",
    ),
    Row(
        "review: no NPU plugin on ARM, and that is said",
        "embedq_worker.device.discovery:no_plugin",
        f"{UNIT}/test_devices.py::test_platform_without_a_plugin_is_said_so",
    ),
    Row(
        "review: a typo is refused, with the nearest name",
        "embedq.errors:nearest",
        f"{UNIT}/test_choices.py::test_typo_is_refused_with_the_nearest_name",
    ),
)


@cache
def functions(path: Path) -> frozenset[str]:
    """Return the names of the functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_feature_has_a_place_and_a_test(row: Row) -> None:
    """The place exists, and so does the test that proves it."""
    if "engines" in row.place or "compiling" in row.place:
        pytest.importorskip("openvino")
    module, _, name = row.place.partition(":")
    assert hasattr(importlib.import_module(module), name), row.place

    file, _, test = row.test.partition("::")
    assert (TESTS / file).exists(), row.test
    assert not test or test in functions(TESTS / file), row.test


def test_readme_has_the_chapter_on_hardware() -> None:
    """BIOS, driver packages, groups, containers, cache and pool are written down for operators."""
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    _, _, rest = readme.partition("\n## Hardware\n")
    chapter = rest.partition("\n## ")[0]

    for word in ("BIOS", "intel-level-zero-npu", "render", "devices:", "CACHE_DIR", "NPU_REQUESTS"):
        assert word in chapter, word
