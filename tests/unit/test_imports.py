"""Imports go from heavy to light: who may load what, read from the source and seen in a process."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.servers import environment

import embedq
import embedq_worker

SDK = Path(embedq.__file__).parent
WORKER = Path(embedq_worker.__file__).parent
#: What a producer must never load.
HEAVY = ("embedq_worker", "onnx", "onnxruntime", "openvino", "tokenizers", "huggingface_hub")
#: Files of the worker that may touch Celery.
CELERY_ROOMS = {
    *("app", "backend", "consumer", "delivery", "leases", "lifecycle", "rerouting", "tasks"),
    *("ticking", "vitals"),
}


def imports(folder: Path) -> dict[str, set[str]]:
    """Return the top-level packages that each file of a folder imports, anywhere in it."""
    found: dict[str, set[str]] = {}
    for path in sorted(folder.rglob("*.py")):
        names: set[str] = set()
        for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(statement, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in statement.names}
            elif isinstance(statement, ast.ImportFrom) and statement.module:
                assert statement.level == 0, f"{path}: relative import"
                names.add(statement.module.partition(".")[0])
        found[path.relative_to(folder).with_suffix("").as_posix()] = names
    return found


def files_importing(package: str, folder: Path) -> set[str]:
    """Return the files of a folder that import a package."""
    return {file for file, names in imports(folder).items() if package in names}


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


def test_sdk_touches_celery_in_one_file() -> None:
    """Only the publisher knows Celery and kombu."""
    assert files_importing("celery", SDK) == {"publisher"}
    assert files_importing("kombu", SDK) == {"publisher"}


def test_worker_touches_celery_where_it_must() -> None:
    """Celery stays in the rooms that speak with it, kombu in its transport and the app."""
    assert files_importing("celery", WORKER) <= CELERY_ROOMS
    assert files_importing("kombu", WORKER) <= {"app", "transport"}


@pytest.mark.parametrize("package", ["onnxruntime", "openvino", "tokenizers"])
def test_each_runtime_has_one_home(package: str) -> None:
    """A runtime is imported in one file, so that one file decides how it is loaded."""
    assert len(files_importing(package, WORKER)) == 1


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
    for module in ("embedq.cli", "embedq_worker.cli"):
        loaded = loaded_after(f"from {module} import cli; cli(['--help'], standalone_mode=False)")
        assert not loaded & {*HEAVY[1:], "celery", "kombu"}, module


def test_health_check_loads_the_standard_library_only() -> None:
    """A container asks it every few seconds, so it answers without click, pydantic or msgpack."""
    code = "from embedq_worker import __main__, health_check; health_check.main([])"

    loaded = loaded_after(code)

    assert not loaded & {*HEAVY[1:], "celery", "click", "msgpack", "numpy", "pydantic", "redis"}


def test_exporter_loads_no_celery() -> None:
    """The exporter reads Redis and speaks HTTP, and needs neither Celery nor numpy."""
    loaded = loaded_after("import embedq.exporter")

    assert not loaded & {*HEAVY, "celery", "kombu", "numpy"}
