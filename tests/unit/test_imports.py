"""Tests of which packages and libraries each module may import."""

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
#: Packages that a producer must never load.
HEAVY = ("embedq_worker", "onnx", "onnxruntime", "openvino", "tokenizers", "huggingface_hub")
#: Package or module -> packages and modules of this project that it may import.
ALLOWED_IMPORTS: dict[str, str] = {
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
    # the main process import pool_process.tasks; it loads no runtime because factory.py and
    # opener.py import runtimes inside functions. test_engine_workers.py reads /proc/PID/maps.
    "embedq_worker.main_process": "embedq.store embedq_worker.device embedq_worker.model "
    "embedq_worker.settings embedq_worker.files embedq_worker.process embedq_worker.errors "
    "embedq_worker.exit_codes",
    "embedq_worker.pool_process": "embedq.store embedq.observability embedq_worker.inference "
    "embedq_worker.main_process embedq_worker.device embedq_worker.settings "
    "embedq_worker.process embedq_worker.errors",
    "embedq_worker.cli": "embedq.cli embedq.store embedq.bulk "
    "embedq_worker.main_process "
    "embedq_worker.inference embedq_worker.engines embedq_worker.model embedq_worker.device "
    "embedq_worker.settings embedq_worker.files embedq_worker.process embedq_worker.errors "
    "embedq_worker.exit_codes",
    "embedq_worker.__main__": "embedq_worker.cli embedq_worker.main_process",
}
#: Packages that every module of the worker may import.
ALLOWED_IN_WORKER = {"embedq.errors", "embedq.settings", "embedq.protocol"}
#: Library -> the only files that may import it.
LIBRARIES: dict[str, str] = {
    "celery": "jobs/publisher main_process/app main_process/bootsteps main_process/consumer "
    "main_process/rerouting pool_process/process pool_process/commit "
    "pool_process/tasks",
    "kombu": "jobs/publisher main_process/app main_process/transport",
    "openvino": "engines/openvino_runtime",
    "onnxruntime": "engines/onnxruntime",
    "tokenizers": "inference/tokenizer",
    "onnx": "model/foreign_onnx model/onnx_file model/onnx_graph",
    "nncf": "cli/quantize",
    "huggingface_hub": "model/sources",
    "pydantic": "settings",
    "pydantic_settings": "settings",
    "rich": "cli/console cli/operations",
    "click": "cli/common cli/main cli/models cli/operations",
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


def package_of(module: str) -> str:
    """Return the first two parts of a dotted name: a package, or a module beside the packages."""
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


def is_project_module(name: str) -> bool:
    return name.partition(".")[0] in ("embedq", "embedq_worker")


def loaded_after(code: str) -> set[str]:
    """Return the top-level packages in sys.modules after running code in a fresh process."""
    code = f"{code}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    completed = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return set(completed.stdout.splitlines()[-1].split())


def requirements(*extras: str) -> set[str]:
    """Return the packages that `embedq` with these extras installs, nested extras included."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    lines, found = [*project["dependencies"]], set()
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    for line in lines:
        name, _, inner = line.partition(";")[0].partition("[")
        if name == "embedq":
            found |= requirements(*inner.rstrip("]").split(","))
        else:
            found.add(re.split("[<>=~! ]", name)[0].lower().replace("_", "-"))
    return found


def test_extra_cpu_installs_no_openvino() -> None:
    assert "onnxruntime" in requirements("cpu")
    assert not {"openvino", "openvino-telemetry"} & requirements("cpu", "local", "parquet")
    assert not {"onnxruntime", "openvino", "onnx", "tokenizers"} & requirements()
    assert {"openvino", "onnxruntime"} <= requirements("npu")


@pytest.mark.parametrize("package", HEAVY)
def test_sdk_imports_nothing_heavy(package: str) -> None:
    assert files_importing(package, SDK) == set()


@pytest.mark.parametrize("package", sorted(ALLOWED_IMPORTS))
def test_package_imports_only_what_is_allowed(package: str) -> None:
    allowed = {package, *ALLOWED_IMPORTS[package].split()}
    if package.startswith("embedq_worker."):
        allowed |= ALLOWED_IN_WORKER

    found = {
        package_of(name)
        for module, path in sources().items()
        if package_of(module) == package
        for name in imported_modules(path)
        if is_project_module(name) and "." in name
    }

    assert found <= allowed


def test_every_package_has_its_allowed_imports() -> None:
    modules = {package_of(module) for module in sources()}

    assert modules - {"embedq.__init__", "embedq_worker.__init__"} == set(ALLOWED_IMPORTS)


def test_packages_have_no_import_cycle() -> None:
    order: list[str] = []
    left = {
        package: set(allowed.split()) - {package} for package, allowed in ALLOWED_IMPORTS.items()
    }
    while left:
        free = [package for package, needs in left.items() if not needs & set(left)]
        assert free, f"an import cycle among {sorted(left)}"
        order += free
        left = {package: needs for package, needs in left.items() if package not in free}


def test_files_have_no_import_cycle() -> None:
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
        assert free, f"an import cycle among {sorted(needs)}"
        needs = {module: wanted for module, wanted in needs.items() if module not in free}


@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_library_is_imported_by_its_own_files_only(library: str) -> None:
    found = files_importing(library, SDK) | files_importing(library, WORKER)

    assert found == set(LIBRARIES[library].split())


def test_init_files_of_packages_hold_only_a_docstring() -> None:
    # Therefore `import embedq.observability.exporter` loads neither Celery nor numpy.
    for folder in (SDK, WORKER):
        for path in folder.glob("*/__init__.py"):
            statements = ast.parse(path.read_text(encoding="utf-8")).body
            assert [type(statement) for statement in statements] == [ast.Expr], path


def test_import_embedq_loads_neither_celery_nor_numpy() -> None:
    assert not loaded_after("import embedq") & {*HEAVY, "celery", "kombu", "numpy", "redis"}


def test_client_loads_no_runtime() -> None:
    loaded = loaded_after("import embedq; embedq.Client(broker_url='redis://127.0.0.1:1/0')")

    assert "celery" in loaded
    assert not loaded & set(HEAVY)


def test_help_of_both_commands_loads_neither_runtime_nor_celery() -> None:
    for module in ("embedq.cli.main", "embedq_worker.cli.main"):
        loaded = loaded_after(f"from {module} import cli; cli(['--help'], standalone_mode=False)")
        assert not loaded & {*HEAVY[1:], "celery", "kombu"}, module


def test_health_check_loads_only_the_standard_library() -> None:
    # A container runs it every few seconds.
    code = (
        "from embedq_worker import __main__;"
        "from embedq_worker.main_process import liveness; liveness.main([])"
    )

    loaded = loaded_after(code)

    assert not loaded & {*HEAVY[1:], "celery", "click", "msgpack", "numpy", "pydantic", "redis"}


def test_exporter_loads_neither_celery_nor_numpy() -> None:
    loaded = loaded_after("import embedq.observability.exporter")

    assert not loaded & {*HEAVY, "celery", "kombu", "numpy"}
