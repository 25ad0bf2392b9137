"""Imports go from heavy to light: who may load what, read from the source and seen in a process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.support.redis import environment

import embedq
import embedq_worker

SDK = Path(embedq.__file__).parent
WORKER = Path(embedq_worker.__file__).parent
CHAOS = Path(__file__).parents[2] / "ops" / "chaos"
#: What a producer must never load.
HEAVY = ("embedq_worker", "onnx", "onnxruntime", "openvino", "tokenizers", "huggingface_hub")
#: Package or module -> packages and modules of ours that it may import.
WALLS: dict[str, str] = {
    "embedq.errors": "",
    "embedq.protocol": "embedq.errors",
    "embedq.settings": "embedq.errors embedq.protocol",
    "embedq.testing": "embedq.errors embedq.protocol",
    "embedq.store": "embedq.errors embedq.protocol embedq.settings",
    "embedq.observability": "embedq.errors embedq.protocol embedq.store",
    "embedq.discovery": "embedq.errors embedq.protocol embedq.settings embedq.store",
    "embedq.jobs": "embedq.errors embedq.protocol embedq.store embedq.observability",
    "embedq.client": "embedq.errors embedq.protocol embedq.settings embedq.store "
    "embedq.observability embedq.discovery embedq.jobs",
    "embedq.bulk": "embedq.errors embedq.protocol embedq.jobs embedq.client",
    "embedq.local": "embedq.errors",
    "embedq.cli": "embedq.errors embedq.protocol embedq.settings embedq.store "
    "embedq.observability embedq.jobs embedq.client embedq.bulk embedq.local",
    "embedq.__main__": "embedq.cli",
    "embedq_worker.exit_codes": "",
    "embedq_worker.process": "",
    "embedq_worker.errors": "",
    "embedq_worker.files": "embedq_worker.errors",
    "embedq_worker.settings": "embedq_worker.files",
    "embedq_worker.device": "embedq_worker.settings embedq_worker.files embedq_worker.errors",
    "embedq_worker.model": "embedq_worker.settings embedq_worker.files embedq_worker.errors",
    "embedq_worker.engines": "embedq.testing embedq_worker.model embedq_worker.device "
    "embedq_worker.settings embedq_worker.files embedq_worker.process embedq_worker.errors",
    "embedq_worker.inference": "embedq.testing embedq_worker.engines embedq_worker.model "
    "embedq_worker.device embedq_worker.settings embedq_worker.files embedq_worker.errors",
    # Never engines or inference: an NPU context does not survive a fork. Celery's `include` makes
    # the main process import pool_process.tasks all the same; what keeps the runtimes out of it is
    # that factory.py and opener.py import them inside functions. test_engine_workers.py reads
    # /proc/PID/maps.
    "embedq_worker.main_process": "embedq.store embedq_worker.device embedq_worker.model "
    "embedq_worker.settings embedq_worker.files embedq_worker.process embedq_worker.errors "
    "embedq_worker.exit_codes",
    "embedq_worker.pool_process": "embedq.store embedq.observability embedq_worker.inference "
    "embedq_worker.main_process embedq_worker.device embedq_worker.settings "
    "embedq_worker.process embedq_worker.errors",
    "embedq_worker.cli": "embedq.cli embedq.store embedq.bulk embedq.jobs "
    "embedq_worker.main_process "
    "embedq_worker.inference embedq_worker.engines embedq_worker.model embedq_worker.device "
    "embedq_worker.settings embedq_worker.files embedq_worker.process embedq_worker.errors "
    "embedq_worker.exit_codes",
    "embedq_worker.__main__": "embedq_worker.cli embedq_worker.main_process",
}
#: What every module of the worker may import.
OPEN_TO_WORKER = {"embedq.errors", "embedq.settings", "embedq.protocol"}
#: Library -> the only files that may import it.
LIBRARIES: dict[str, str] = {
    "celery": "jobs/publisher main_process/app main_process/bootsteps main_process/consumer "
    "main_process/rerouting pool_process/process pool_process/commit",
    "kombu": "jobs/publisher main_process/app main_process/transport",
    "openvino": "engines/openvino_runtime",
    "onnxruntime": "engines/onnxruntime",
    "tokenizers": "inference/tokenizer",
    "onnx": "model/bert model/onnx_graph",
    "nncf": "cli/quantize",
    "huggingface_hub": "model/sources",
    "pydantic": "settings",
    "pydantic_settings": "settings",
    "rich": "cli/console cli/operations",
    "click": "cli/common cli/main cli/operations",
    "prometheus_client": "observability/exporter",
    "opentelemetry": "observability/tracing pool_process/process",
    "pyarrow": "bulk/writers",
}


def imported_modules(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it."""
    found: set[str] = set()
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            assert statement.level == 0, f"{path}: relative import"
            found |= {f"{statement.module}.{alias.name}" for alias in statement.names}
    return found


def place_of(module: str) -> str:
    """Return the sub-package, or the module beside the sub-packages, that a name lies in."""
    return ".".join(module.split(".")[:2])


def sources() -> dict[str, Path]:
    """Return the modules of both packages by their dotted names."""
    return {
        ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts)): path
        for folder in (SDK, WORKER)
        for path in sorted(folder.rglob("*.py"))
    }


def files_importing(package: str, folder: Path) -> set[str]:
    """Return the files of a folder that import a library."""
    return {
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*.py")
        if package in {name.partition(".")[0] for name in imported_modules(path)}
    }


def is_ours(name: str) -> bool:
    """Tell the project's modules from libraries."""
    return name.partition(".")[0] in ("embedq", "embedq_worker")


def loaded_after(code: str) -> set[str]:
    """Return the top-level packages in sys.modules after running code in a fresh process."""
    code = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.splitlines()[-1].split())


def requirements(*extras: str) -> set[str]:
    """Return the packages that `embedq` with these extras asks for, extras of extras included."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    asked, found = [*project["dependencies"]], set()
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    for line in asked:
        name, _, inner = line.partition(";")[0].partition("[")
        if name == "embedq":
            found |= requirements(*inner.rstrip("]").split(","))
        else:
            found.add(re.split("[<>=~! ]", name)[0].lower().replace("_", "-"))
    return found


def test_who_computes_on_the_cpu_installs_no_openvino() -> None:
    """The extra [cpu] and the SDK do without; [npu] brings it, and the reference beside it."""
    assert "onnxruntime" in requirements("cpu")
    assert not {"openvino", "openvino-telemetry"} & requirements("cpu", "local", "parquet")
    assert not {"onnxruntime", "openvino", "onnx", "tokenizers"} & requirements()
    assert {"openvino", "onnxruntime"} <= requirements("npu")


@pytest.mark.parametrize("package", HEAVY)
def test_sdk_imports_nothing_heavy(package: str) -> None:
    """No file of the SDK imports the worker or a runtime, not even inside a function."""
    assert files_importing(package, SDK) == set()


@pytest.mark.parametrize("place", sorted(WALLS))
def test_package_imports_only_what_its_wall_allows(place: str) -> None:
    allowed = {place, *WALLS[place].split()}
    if place.startswith("embedq_worker."):
        allowed |= OPEN_TO_WORKER

    found = {
        place_of(name)
        for module, path in sources().items()
        if place_of(module) == place
        for name in imported_modules(path)
        if is_ours(name) and "." in name
    }

    assert found <= allowed


def test_every_module_has_a_wall() -> None:
    modules = {place_of(module) for module in sources()}

    assert modules - {"embedq.__init__", "embedq_worker.__init__"} == set(WALLS)


def test_no_package_imports_another_in_a_circle() -> None:
    order: list[str] = []
    left = {place: set(allowed.split()) - {place} for place, allowed in WALLS.items()}
    while left:
        free = [place for place, needs in left.items() if not needs & set(left)]
        assert free, f"a circle among {sorted(left)}"
        order += free
        left = {place: needs for place, needs in left.items() if place not in free}


def test_no_file_imports_another_in_a_circle() -> None:
    modules = {**sources(), **{f"ops.chaos.{path.stem}": path for path in CHAOS.glob("*.py")}}
    needs = {
        module: {
            known
            for name in imported_modules(path)
            for known in (name, name.rpartition(".")[0])
            if known in modules and known != module
        }
        for module, path in modules.items()
    }
    while needs:
        free = {module for module, wanted in needs.items() if not wanted & set(needs)}
        assert free, f"a circle among {sorted(needs)}"
        needs = {module: wanted for module, wanted in needs.items() if module not in free}


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_library_is_imported_by_its_own_files_only(library: str) -> None:
    found = files_importing(library, SDK) | files_importing(library, WORKER)

    assert found == set(LIBRARIES[library].split())


def test_init_files_only_hand_out_names() -> None:
    """`import embedq.observability.exporter` loads neither Celery nor numpy, because of this."""
    for folder in (SDK, WORKER):
        for path in folder.glob("*/__init__.py"):
            statements = ast.parse(path.read_text(encoding="utf-8")).body
            assert [type(statement) for statement in statements] == [ast.Expr], path


def test_import_of_the_package_costs_next_to_nothing() -> None:
    """`import embedq` alone loads neither Celery nor numpy."""
    assert not loaded_after("import embedq") & {*HEAVY, "celery", "kombu", "numpy", "redis"}


def test_client_loads_no_runtime() -> None:
    """The SDK, ready to use, has loaded neither the worker nor a runtime."""
    loaded = loaded_after("import embedq; embedq.Client(broker_url='redis://127.0.0.1:1/0')")

    assert "celery" in loaded
    assert not loaded & set(HEAVY)


def test_help_of_both_commands_loads_no_runtime() -> None:
    """`--help` answers without Celery, numpy or a runtime."""
    for module in ("embedq.cli.main", "embedq_worker.cli.main"):
        loaded = loaded_after(f"from {module} import cli; cli(['--help'], standalone_mode=False)")
        assert not loaded & {*HEAVY[1:], "celery", "kombu"}, module


def test_health_check_loads_the_standard_library_only() -> None:
    """A container asks it every few seconds, so it answers without click, pydantic or msgpack."""
    code = (
        "from embedq_worker import __main__;"
        "from embedq_worker.main_process import liveness; liveness.main([])"
    )

    loaded = loaded_after(code)

    assert not loaded & {*HEAVY[1:], "celery", "click", "msgpack", "numpy", "pydantic", "redis"}


def test_exporter_loads_no_celery() -> None:
    """The exporter reads Redis and speaks HTTP, and needs neither Celery nor numpy."""
    loaded = loaded_after("import embedq.observability.exporter")

    assert not loaded & {*HEAVY, "celery", "kombu", "numpy"}
