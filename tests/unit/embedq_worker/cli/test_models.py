"""Tests of `embedq-worker models`: known models, one folder, and a model that is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.models import TINY_MAX_LENGTH, write_json, write_tiny
from tests.support.redis import environment

from embedq_worker import exit_codes
from embedq_worker.model.families import FAMILIES
from embedq_worker.model.prompts import PROMPT_SETS


def models(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "embedq_worker", "models", *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_known_models_are_of_families_and_prompt_sets_that_exist() -> None:
    known = json.loads(models("ls", "--json").stdout)["models"]

    assert {model["family"] for model in known} <= set(FAMILIES)
    assert {model["prompts"] for model in known} <= {"", "files", *PROMPT_SETS}
    bge = next(model for model in known if model["name"] == "BAAI/bge-m3")
    assert (bge["pooling"], bge["max_length"], bge["licence"]) == ("cls", 8192, "mit")


def test_folder_is_shown_with_prompts_and_licence(tmp_path: Path) -> None:
    write_tiny(tmp_path, pooling="cls")
    write_json(tmp_path / "config_sentence_transformers.json", {"prompts": {"document": ""}})
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# A model\n")

    shown = json.loads(models("show", str(tmp_path), "--json", EMBEDQ_PROMPTS="e5").stdout)

    assert (shown["family"], shown["pooling"], shown["max_length"]) == (
        "bert",
        "cls",
        TINY_MAX_LENGTH,
    )
    assert shown["prompts"] == {"document": "", "query": "query: ", "passage": "passage: "}
    assert shown["licence"] == "apache-2.0"


def test_pooling_that_no_file_names_ends_with_the_code_of_a_model(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "modules.json").unlink()

    failed = models("show", str(tmp_path))

    assert failed.returncode == exit_codes.MODEL
    [line] = failed.stderr.splitlines()
    assert "EMBEDQ_POOLING=mean" in line


def test_unknown_prompt_set_ends_with_the_code_of_settings(tmp_path: Path) -> None:
    write_tiny(tmp_path)

    failed = models("show", str(tmp_path), EMBEDQ_PROMPTS="e4")

    assert failed.returncode == exit_codes.SETTINGS
    assert "EMBEDQ_PROMPTS is e4; expected one of e5, bge-en, nomic." in failed.stderr
