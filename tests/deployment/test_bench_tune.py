"""ops/bench/tune.py as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.models import tiny_model

SCRIPT = Path(__file__).resolve().parents[2] / "ops/bench/tune.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tune_prints_the_settings_to_set(tmp_path: Path) -> None:
    folder, figures = tmp_path / "model", tmp_path / "tune.json"
    folder.mkdir()
    tiny_model(folder)

    done = run(
        *("--quick", "--cores", "1", "--json", str(figures), "--plot", str(tmp_path / "tune.svg")),
        EMBEDQ_MODEL=str(folder),
        EMBEDQ_CACHE_DIR=str(tmp_path / "cache"),
        EMBEDQ_ENGINE="onnxruntime",
    )

    assert done.returncode == 0, done.stderr
    settings = json.loads(figures.read_text())["settings"]
    assert list(settings) == ["EMBEDQ_THREADS", "EMBEDQ_STREAMS", "EMBEDQ_TOKEN_BUDGET"]
    assert all(f"  {name}={value}\n" in done.stdout for name, value in settings.items())


def test_tune_refuses_settings_that_fix_the_answer(tmp_path: Path) -> None:
    done = run(EMBEDQ_DEVICE="stub", EMBEDQ_MODEL="stub", EMBEDQ_CACHE_DIR=str(tmp_path))

    assert done.returncode == 1
    assert "leave nothing to measure" in done.stderr
